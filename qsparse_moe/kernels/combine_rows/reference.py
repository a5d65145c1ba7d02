"""Reference of the weighted sum of the rows of each token. T tokens, A choices per token, N rows, D features."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_rows(rows_ND: Tensor, weights_TA: Tensor, row_TA: Tensor, slot_N: Tensor) -> Tensor:
    """Return ``(T, D)``: the weighted sum of each token's rows, added in at least fp32, in the dtype of the rows.

    Args:
        rows_ND: the rows ``(N, D)``.
        weights_TA: the weight of each choice. It must be 0 for a choice without a row, whose gradient is 0.
        row_TA: int64, the row of each choice; any valid row for a choice without one.
        slot_N: int64, the choice of each row, as ``token * A + choice``; every row belongs to exactly one choice.
    """
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    has_row_S = torch.zeros(row_TA.numel(), dtype=torch.bool, device=row_TA.device).index_fill(0, slot_N, True)
    weights_TA = weights_TA.to(wide) * has_row_S.view_as(row_TA)
    return (rows_ND[row_TA].to(wide) * weights_TA[..., None]).sum(1).to(rows_ND.dtype)
