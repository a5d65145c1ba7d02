"""Reference of the fused gated activation, top-K selection, and row sums. N rows, F hidden features.

The two activations here are also the references of ``nn.activations``, so each has one definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.sparsity.stats import row_sums
from qsparse_moe.sparsity.topk import Gradient, topk_sparsify

Activation = Callable[[Tensor, Tensor], Tensor]


class SelectionSums(NamedTuple):
    """K of every row, followed by the fields of ``RowSums``: what the fused pass reports, in at least fp32.

    Summed over the rows, they are the fields of ``site_stats``.
    """

    selected_N: Tensor  # number of selected features, including those that are zero
    nonzero_N: Tensor  # number of nonzero features after the selection
    energy_N: Tensor  # sum of squares before the selection
    kept_energy_N: Tensor  # sum of squares after it


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202)."""
    return F.silu(gate_NF) * up_NF


def relu2glu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``relu(gate)^2 * up`` (arXiv 2407.10969, section 2.3)."""
    return gate_NF.relu().square() * up_NF


ACTIVATIONS: dict[str, Activation] = {"relu2glu": relu2glu, "swiglu": swiglu}


def fused_glu(
    gate_NF: Tensor,
    up_NF: Tensor,
    num_selected: int | Tensor,
    *,
    activation: str = "relu2glu",
    gradient: Gradient = "ste",
) -> tuple[Tensor, SelectionSums]:
    """Return ``topk_sparsify(activation(gate, up), num_selected)`` and its row sums.

    The selection uses the activation rounded to the dtype of ``gate``.

    Args:
        gate_NF: the gate branch ``(N, F)``.
        up_NF: the up branch ``(N, F)``.
        num_selected: K with ``1 <= K <= F``: one for all rows, or an int tensor ``(N,)``.
        activation: ``relu2glu`` or ``swiglu``.
        gradient: ``ste`` or ``masked``, as in ``topk_sparsify``.

    Returns:
        The rows ``(N, F)`` with K selected features each, and the sums, which have no gradient.
    """
    dense_NF = ACTIVATIONS[activation](gate_NF, up_NF)
    selected_NF = topk_sparsify(dense_NF, num_selected, gradient=gradient)
    return selected_NF, selection_sums(dense_NF.detach(), selected_NF.detach(), num_selected)


def selection_sums(dense_NF: Tensor, selected_NF: Tensor, num_selected: int | Tensor) -> SelectionSums:
    """Return the sums of rows before and after a selection of ``num_selected`` features."""
    sums = row_sums(dense_NF, selected_NF)
    return SelectionSums(torch.zeros_like(sums.nonzero_N) + num_selected, *sums)
