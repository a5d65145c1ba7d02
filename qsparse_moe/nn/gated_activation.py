"""What stands between the input matrices of a feed-forward and its output matrix: activation, then the sparse site.

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
from qsparse_moe.sparsity.topk import rescale_kept


class SparseActivation:
    """``site(activation(gate, up))``: in one pass over memory where the site's settings of the moment allow it.

    It holds no parameter and no state; the site is the owner's.
    """

    def __init__(self, activation: str, site: SparseSite, fused: FusedGLU | None) -> None:
        """``fused`` None always takes the activation and the site one after the other, which defines the result.

        Where its pass cannot stand for both it still brings the activation's backward.
        """
        self._activation = activation
        self._site = site
        self._fused = fused if activation in FUSED_ACTIVATIONS else None

    def __call__(
        self,
        gate_NF: Tensor | None,
        up_NF: Tensor,
        expert_ids_N: Tensor | None = None,
        *,
        with_stats: bool,
        readers: Readers | None = None,
    ) -> tuple[Tensor, Stats]:
        """The sparse hidden rows, as many dims as ``up_NF``, and, if asked for, the sums of ``site_stats``.

        Args:
            gate_NF: None under an activation without a gate.
            up_NF: ``(*, F)``.
            expert_ids_N: the expert of every row; needed where the site's numbers differ between experts.
            with_stats: False returns no sums.
            readers: for the sums, as in ``SparseSite.forward``.
        """
        if gate_NF is None:
            dense_NF = UNGATED_ACTIVATIONS[self._activation](up_NF)
        elif self._fused is not None and self._site.can_fuse:
            wanted = self._site.ranking.num_kept_of_rows(expert_ids_N)
            kept_NF, sums = self._in_one_pass(self._fused, gate_NF, up_NF, wanted, with_stats)
            stats = {} if sums is None else self._site.stats_of(sums, kept_NF, wanted, readers)
            return rescale_kept(kept_NF, kept_NF, self._site.settings.rescale), stats
        elif self._fused is not None and up_NF.dtype != torch.float64:  # in Triton its arithmetic is fp32
            dense_NF = _BackwardInOnePass.apply(gate_NF, up_NF, self._activation, self._fused)
        else:
            dense_NF = ACTIVATIONS[self._activation](gate_NF, up_NF)
        return self._site(dense_NF, expert_ids_N, with_stats=with_stats, readers=readers)

    def _in_one_pass(
        self, by: FusedGLU, gate_NF: Tensor, up_NF: Tensor, num_kept: int | Tensor, with_sums: bool
    ) -> tuple[Tensor, RowSums | None]:
        kept_NF, sums = fused_glu(
            gate_NF.flatten(0, -2),
            up_NF.flatten(0, -2),
            num_kept,
            by=by,
            activation=self._activation,
            gradient="ste" if self._site.ste_share else "masked",
            with_sums=with_sums,
        )
        return kept_NF.view_as(up_NF), None if sums is None else RowSums(*sums[1:])


class _BackwardInOnePass(torch.autograd.Function):
    """A gated activation in stock PyTorch, with the backward of ``by``: one pass over memory in place of four."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, activation: str, by: FusedGLU) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.activation, ctx.by = activation, by
        return ACTIVATIONS[activation](gate_NF, up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate_NF, up_NF, grad_rows_NF = (x.flatten(0, -2) for x in (*ctx.saved_tensors, grad_NF))
        grad_gate_NF, grad_up_NF = ctx.by.backward(gate_NF, up_NF, grad_rows_NF, None, ctx.activation)
        return grad_gate_NF.view_as(grad_NF), grad_up_NF.view_as(grad_NF), None, None
