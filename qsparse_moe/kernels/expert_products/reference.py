"""The products of routed tokens with the matrices of their experts: the definition.

N routed tokens sorted by expert, E experts, X and Y widths.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_products(
    rows_NX: Tensor, first_EXY: Tensor, second_EXY: Tensor | None = None, *, counts_E: Tensor
) -> tuple[Tensor, ...]:
    """Return ``(N, Y)`` for every stack of weights: the rows of each expert times its matrix.

    Args:
        rows_NX: the rows of the first expert, then those of the second, and so on.
        first_EXY: one matrix per expert.
        second_EXY: matrices that multiply the same rows, as up does beside gate.
        counts_E: number of rows per expert, int64 in host memory; their sum is N.
    """
    parts = rows_NX.split(counts_E.tolist())
    stacks = [first_EXY] if second_EXY is None else [first_EXY, second_EXY]
    return tuple(
        torch.cat([part @ weight_XY for part, weight_XY in zip(parts, weights_EXY.unbind(), strict=True)])
        for weights_EXY in stacks
    )
