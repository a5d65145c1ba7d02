"""A dense feed-forward network: the shared experts of a MoE layer, or the feed-forward part of a dense layer.

B batch, S sequence, D width, F hidden width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import has_gate
from qsparse_moe.kernels.onednn import linear
from qsparse_moe.nn.gated_activation import SparseActivation
from qsparse_moe.nn.gathered_feed_forward import RowsOfExperts, Weights, gathered_feed_forward
from qsparse_moe.nn.runtime import SiteRuntime
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.stats import Stats

_SITES: dict[str, tuple[Site, Site]] = {
    "shared": ("shared_input", "shared_hidden"),
    "dense": ("dense_input", "dense_hidden"),
}


class FeedForward(nn.Module):
    """``down(activation(gate(x), up(x)))`` with one sparse site before gate and up, and one before down.

    ``w_gate`` is None if the activation has no gate.
    """

    def __init__(
        self, config: ModelConfig, part: Literal["shared", "dense"], hidden_size: int, runtime: SiteRuntime
    ) -> None:
        super().__init__()
        width = config.hidden_size
        # Not initialised here: model.init fills every parameter, so that all initial values are in one place.
        self.w_gate = nn.Parameter(torch.empty(width, hidden_size)) if has_gate(config) else None
        self.w_up = nn.Parameter(torch.empty(width, hidden_size))
        self.w_down = nn.Parameter(torch.empty(hidden_size, width))
        input_site, hidden_site = _SITES[part]
        self.input_site = runtime.make_site(input_site, width, config.sparsity)
        self.hidden_site = runtime.make_site(hidden_site, hidden_size, config.sparsity)
        self.activation = SparseActivation(config.moe.activation, self.hidden_site, runtime.fused_glu)
        self.weight_format = config.sparsity.quantization.weights

    def forward(self, x_BSD: Tensor, *, with_stats: bool) -> tuple[Tensor, Stats, Stats]:
        """Return the output ``(B, S, D)`` and the statistics of the input site and of the hidden site."""
        if not with_stats and self._gathers():
            return self._gathered(x_BSD)
        x_BSD, input_stats = self.input_site(x_BSD, with_stats=with_stats)
        gate_BSF = None if self.w_gate is None else self._project(x_BSD, self.w_gate)
        # No readers, as at every site without experts: each row is read once, and the site itself finds the sequences.
        hidden_BSF, hidden_stats = self.activation(gate_BSF, self._project(x_BSD, self.w_up), with_stats=with_stats)
        return self._project(hidden_BSF, self.w_down), input_stats, hidden_stats

    def _gathers(self) -> bool:
        """Return whether the products read the features that all tokens share only."""
        sites = (self.input_site, self.hidden_site)
        return all(site.gathers for site in sites) and not all(site.selector.selects_all for site in sites)

    def _gathered(self, x_BSD: Tensor) -> tuple[Tensor, Stats, Stats]:
        x_ND = x_BSD.flatten(0, -2)
        matrices = (None if w is None else as_format(w, self.weight_format)[None] for w in self._matrices())
        weights = Weights(*matrices)  # type: ignore[arg-type]
        rows = RowsOfExperts(
            [len(x_ND)], _times, lambda rows_NX, *stacks: (_times(rows_NX, stacks[0]), _times(rows_NX, stacks[1]))
        )
        y_ND, *stats = gathered_feed_forward(x_ND, weights, (self.input_site, self.hidden_site), self.activation, rows)
        return y_ND.view_as(x_BSD), stats[0], stats[1]

    def _matrices(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.w_gate, self.w_up, self.w_down

    def _project(self, x_BSX: Tensor, weight_XY: Tensor) -> Tensor:
        # Stored as (in, out), like the stacked matrices of experts; linear expects (out, in). Rounded in every call,
        # because the optimizer updates the stored weights in full precision. The product is in the dtype of the
        # weights, which generation may store in bf16 beside activations in fp32.
        weight_YX = as_format(weight_XY, self.weight_format).T
        rounded_BSX = x_BSX.to(weight_YX.dtype)
        return linear(rounded_BSX, weight_YX).to(x_BSX.dtype)


def _times(rows_NX: Tensor, stack_1XY: Tensor) -> Tensor:
    return linear(rows_NX, stack_1XY[0].T)
