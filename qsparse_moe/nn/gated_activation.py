"""The activation of a feed-forward network and the sparse site after it, fused into one pass where possible.

N rows, F hidden features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsparse_moe.kernels.fused_glu.op import FusedGLU, fused_glu
from qsparse_moe.kernels.fused_glu.reference import ACTIVATIONS as FUSED_ACTIVATIONS
from qsparse_moe.nn.activations import ACTIVATIONS, UNGATED_ACTIVATIONS
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.stats import Readers, RowSums, Stats
from qsparse_moe.sparsity.topk import rescale_selected


class SparseActivation:
    """``site(activation(gate, up))``, computed in one pass over memory if the current settings of the site allow it.

    It has no parameters and no state. The site is a submodule of the feed-forward network.
    """

    def __init__(self, activation: str, site: SparseSite, fused: FusedGLU | None) -> None:
        """Create the activation for ``site``.

        Args:
            activation: name in ``model.moe.activation``.
            site: the sparse site before the output matrix.
            fused: the fused implementation. If it cannot serve a call, its backward of the activation is still used.
                None always runs the activation and then the site, which defines the result.
        """
        self._activation = activation
        self._site = site
        self.use_fused(fused)

    def use_fused(self, fused: FusedGLU | None) -> None:
        """Use another fused implementation from now on, or none; see ``__init__``."""
        self._fused = fused if self._activation in FUSED_ACTIVATIONS else None

    def __call__(
        self,
        gate_NF: Tensor | None,
        up_NF: Tensor,
        expert_ids_N: Tensor | None = None,
        *,
        with_stats: bool,
        readers: Readers | None = None,
    ) -> tuple[Tensor, Stats]:
        """Return the sparse hidden rows in the shape of ``up_NF`` and, if requested, the statistics of the site.

        Args:
            gate_NF: ``(*, F)``; None if the activation has no gate.
            up_NF: ``(*, F)``.
            expert_ids_N: the expert of every row; required if S differs between experts.
            with_stats: if False, the statistics are empty.
            readers: for the statistics, as in ``SparseSite.forward``.
        """
        if gate_NF is not None and self._fused is not None and self._site.can_fuse:
            wanted = self._site.ranking.num_selected_of_rows(expert_ids_N)
            selected_NF, sums = self._in_one_pass(self._fused, gate_NF, up_NF, wanted, with_stats)
            stats = {} if sums is None else self._site.stats_of(sums, selected_NF, wanted, readers)
            # Only "preserve" uses the norm before the selection, and with it a site cannot be fused.
            return rescale_selected(selected_NF, selected_NF, self._site.settings.rescale), stats
        return self._site(self.dense(gate_NF, up_NF), expert_ids_N, with_stats=with_stats, readers=readers)

    def dense(self, gate_NF: Tensor | None, up_NF: Tensor) -> Tensor:
        """Return the activation of every feature in the shape of ``up_NF``, without the site."""
        if gate_NF is None:
            return UNGATED_ACTIVATIONS[self._activation](up_NF)
        if self._fused is not None and up_NF.dtype != torch.float64:
            # fp64 is left out because the Triton kernel computes in fp32.
            return _BackwardInOnePass.apply(gate_NF, up_NF, self._activation, self._fused)
        return ACTIVATIONS[self._activation](gate_NF, up_NF)

    def _in_one_pass(
        self, by: FusedGLU, gate_NF: Tensor, up_NF: Tensor, num_selected: int | Tensor, with_sums: bool
    ) -> tuple[Tensor, RowSums | None]:
        # can_fuse admits no blended gradient, so the weight of the straight-through gradient is 0 or 1.
        selected_NF, sums = fused_glu(
            gate_NF.flatten(0, -2),
            up_NF.flatten(0, -2),
            num_selected,
            by=by,
            activation=self._activation,
            gradient="ste" if self._site.ste_share else "masked",
            with_sums=with_sums,
        )
        # The first field is K, which the site already knows.
        return selected_NF.view_as(up_NF), None if sums is None else RowSums(*sums[1:])


class _BackwardInOnePass(torch.autograd.Function):
    """A gated activation in stock PyTorch with the backward of ``by``: one pass over memory instead of four."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, activation: str, by: FusedGLU) -> Tensor:
        # Only the backward comes from ``by``. Forward, silu and a product in place take 10 ms for 8192 rows of 768 in
        # fp32 and C++ about 15; backward, stock PyTorch takes 23 and C++ 9 (one thread of a Zen 3, lab log of 24
        # November 2026).
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.activation, ctx.by = activation, by
        return ACTIVATIONS[activation](gate_NF, up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate_NF, up_NF, grad_rows_NF = (x.flatten(0, -2) for x in (*ctx.saved_tensors, grad_NF))
        grad_gate_NF, grad_up_NF = ctx.by.backward(gate_NF, up_NF, grad_rows_NF, None, ctx.activation)
        return grad_gate_NF.view_as(grad_NF), grad_up_NF.view_as(grad_NF), None, None
