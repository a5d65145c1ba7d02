"""One expert after the other: the definition that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.permutation import RowCounts


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: RowCounts) -> Tensor:
    """``(N, Y)``: each expert's rows times its matrix. Waits for the counts on the host."""
    parts = rows_NX.split(counts.as_list)
    return torch.cat([part @ weight for part, weight in zip(parts, weights_EXY.unbind(), strict=True)])


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """None: it runs everywhere."""
    return None
