"""Each token's rows weighted and added, written out. T tokens, A choices a token, N rows, D features."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_rows(rows_ND: Tensor, weights_TA: Tensor, row_TA: Tensor, slot_N: Tensor) -> Tensor:
    """``(T, D)``: the rows of each token, weighted and added in at least fp32, in the dtype of the rows.

    Args:
        rows_ND: ``(N, D)``.
        weights_TA: one a choice; of a choice that has no row it must be 0, and its gradient is 0.
        row_TA: int64, the row of each choice; of one that has none any row.
        slot_N: int64, the choice of each row, as ``token * A + choice``; every row belongs to one.
    """
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    has_row_S = torch.zeros(row_TA.numel(), dtype=torch.bool, device=row_TA.device).index_fill(0, slot_N, True)
    weights_TA = weights_TA.to(wide) * has_row_S.view_as(row_TA)
    return (rows_ND[row_TA].to(wide) * weights_TA[..., None]).sum(1).to(rows_ND.dtype)
