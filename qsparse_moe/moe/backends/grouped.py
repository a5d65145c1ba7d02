"""Backend ``grouped``: all experts in one call of PyTorch's grouped matrix product. N rows, X and Y widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.backends.gathered_sizes import expert_sizes, ramps
from qsparse_moe.moe.permutation import TokenCounts

# grouped_mm requires rows whose size is a multiple of 16 bytes: 8 features in bf16, 4 in fp32. The dtype of the model
# is not known when the backend is chosen, so the stricter rule applies.
_MULTIPLE = 8


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: TokenCounts) -> Tensor:
    """Return ``(N, Y)``: the rows of each expert times its matrix. The row counts stay on the device.

    If PyTorch has no grouped kernel for the dtype on the device, its fallback copies the counts to the host.
    """
    return F.grouped_mm(rows_NX, weights_EXY, offs=counts.ends_E)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """Return the reason why this backend cannot run the experts of the model, or None if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm; it is public since torch 2.10"
    for name, sizes in expert_sizes(config).items():
        for size in sorted(sizes):
            if size % _MULTIPLE:
                return f"{name} ({size}) must be a multiple of {_MULTIPLE}; the nearest are {near(size)}"
    return ramps(config)


def near(size: int) -> str:
    """Return the supported sizes below and above ``size``, for an error message."""
    below = size // _MULTIPLE * _MULTIPLE
    return f"{below} and {below + _MULTIPLE}" if below else str(_MULTIPLE)
