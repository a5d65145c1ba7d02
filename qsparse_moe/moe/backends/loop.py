"""Backend ``loop``: one expert after the other, the reference of every other backend. N rows, X and Y widths."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.permutation import TokenCounts


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: TokenCounts) -> Tensor:
    """Return ``(N, Y)``: the rows of each expert times its matrix. Waits for the row counts on the host."""
    parts = rows_NX.split(counts.as_list)
    # unbind and not weights[e], whose backward builds a gradient of the full size for every expert.
    return torch.cat([part @ weight for part, weight in zip(parts, weights_EXY.unbind(), strict=True)])


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """Return None: this backend runs everywhere."""
    return None
