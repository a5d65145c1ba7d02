"""The weights of the routed experts and their forward pass. N routed tokens, D width, F hidden width, E experts.

Each of the P ranks that share the experts holds L = E / P of them; without expert parallelism L = E.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import has_gate
from qsparse_moe.moe.expert_group import shard_over
from qsparse_moe.moe.permutation import TokenCounts
from qsparse_moe.moe.runtime import Runtime
from qsparse_moe.nn.gated_activation import SparseActivation
from qsparse_moe.nn.gathered_feed_forward import RowsOfExperts, Weights, gathered_feed_forward
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import as_format
from qsparse_moe.sparsity.stats import Readers, Stats


class Experts(nn.Module):
    """L feed-forward networks as stacked matrices: gate (None if the activation has none), up, and down.

    This module owns the weights. The runtime's ``matmul`` multiplies with them and owns the speed.
    """

    def __init__(self, config: ModelConfig, runtime: Runtime) -> None:
        super().__init__()
        moe = config.moe
        width, hidden = config.hidden_size, moe.expert_hidden_size
        num_local = runtime.expert_group.num_local(moe.num_experts)
        self.w_gate = nn.Parameter(torch.empty(num_local, width, hidden)) if has_gate(config) else None
        self.w_up = nn.Parameter(torch.empty(num_local, width, hidden))
        self.w_down = nn.Parameter(torch.empty(num_local, hidden, width))
        for parameter in self.parameters():
            shard_over(parameter, runtime.expert_group)
        # The site knows S of all E experts, because routed tokens carry the global number of their expert.
        self.hidden_site = runtime.sites.make_site(
            "expert_hidden", hidden, config.sparsity, num_experts=moe.num_experts
        )
        self.activation = SparseActivation(moe.activation, self.hidden_site, runtime.sites.fused_glu)
        self.weight_format = config.sparsity.quantization.weights
        self.matmul, self.matmul_pair = runtime.matmul, runtime.matmul_pair
        self._first_expert = runtime.expert_group.rank * num_local

    def forward(
        self,
        x_ND: Tensor,
        tokens_per_expert_L: Tensor,
        expert_N: Tensor,
        *,
        with_stats: bool,
        readers: Readers | None = None,
        input_site: SparseSite | None = None,
    ) -> tuple[Tensor, Stats, Stats]:
        """Run the experts on routed tokens that are sorted by expert.

        Args:
            x_ND: the routed tokens of this rank's experts.
            tokens_per_expert_L: number of routed tokens per expert of this rank.
            expert_N: the expert of each routed token, numbered among all E.
            with_stats: if False, the statistics are empty.
            readers: for the statistics, as in ``SparseSite.forward``.
            input_site: ``expert_input``, if the tokens of each expert share features and are not selected yet.

        Returns:
            The outputs ``(N, D)``, and the statistics of the sites ``expert_input`` (empty without ``input_site``) and
            ``expert_hidden``.
        """
        # One object for the three products, so that a backend copies the counts to the host at most once.
        counts = TokenCounts(tokens_per_expert_L)
        input_stats: Stats = {}
        if input_site is not None:
            if self._gathers(input_site, with_stats):
                return self._gathered(x_ND, counts, expert_N, input_site)
            x_ND, input_stats = input_site(x_ND, expert_N, with_stats=with_stats, readers=readers)
        gate_NF, up_NF = self._gate_and_up(x_ND, counts)
        hidden_NF, stats = self.activation(gate_NF, up_NF, expert_N, with_stats=with_stats, readers=readers)
        return self._project(hidden_NF, self.w_down, counts), input_stats, stats

    def _gathers(self, input_site: SparseSite, with_stats: bool) -> bool:
        """Return whether the products read the selected features only: statistics need whole rows."""
        sites = (input_site, self.hidden_site)
        return not with_stats and all(site.gathers for site in sites) and not all(s.selector.selects_all for s in sites)

    def _gathered(
        self, x_ND: Tensor, counts: TokenCounts, expert_N: Tensor, input_site: SparseSite
    ) -> tuple[Tensor, Stats, Stats]:
        w_gate = None if self.w_gate is None else self._rounded(self.w_gate)
        weights = Weights(w_gate, self._rounded(self.w_up), self._rounded(self.w_down))
        rows = RowsOfExperts(
            counts.as_list,
            lambda rows_NX, stack: self.matmul(rows_NX, stack, counts),
            lambda rows_NX, first, second: self.matmul_pair(rows_NX, first, second, counts),
            expert_N,
            self._first_expert,
        )
        return gathered_feed_forward(x_ND, weights, (input_site, self.hidden_site), self.activation, rows)

    def _gate_and_up(self, x_ND: Tensor, counts: TokenCounts) -> tuple[Tensor | None, Tensor]:
        if self.w_gate is None:
            return None, self._project(x_ND, self.w_up, counts)
        w_gate, w_up = self._rounded(self.w_gate), self._rounded(self.w_up)
        gate_NF, up_NF = self.matmul_pair(x_ND.to(w_up.dtype), w_gate, w_up, counts)
        return gate_NF.to(x_ND.dtype), up_NF.to(x_ND.dtype)

    def _project(self, x_NX: Tensor, weights_LXY: Tensor, counts: TokenCounts) -> Tensor:
        weights_LXY = self._rounded(weights_LXY)
        # The product is in the dtype of the weights, which generation may store in bf16 beside activations in fp32.
        rounded_NX = x_NX.to(weights_LXY.dtype)
        return self.matmul(rounded_NX, weights_LXY, counts).to(x_NX.dtype)

    def _rounded(self, weights_LXY: Tensor) -> Tensor:
        # Rounded in every call: the optimizer updates the stored weights in full precision.
        return as_format(weights_LXY, self.weight_format)
