"""All experts in one call of PyTorch's grouped matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.permutation import RowCounts

# grouped_mm wants rows of whole 16 bytes: 8 features in bf16, 4 in fp32. The model's dtype is not known when the
# backend is chosen, so the stricter one holds.
_MULTIPLE = 8


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: RowCounts) -> Tensor:
    """``(N, Y)``: each expert's rows times its matrix; the counts stay on the device.

    PyTorch copies them to the host all the same where none of its grouped kernels takes the dtype on the device.
    """
    return F.grouped_mm(rows_NX, weights_EXY, offs=counts.ends_E)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """The reason why this model's experts cannot run through it, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm; it is public since torch 2.10"
    sizes = {"model.hidden_size": config.hidden_size, "model.moe.expert_hidden_size": config.moe.expert_hidden_size}
    for name, size in sizes.items():
        if size % _MULTIPLE:
            return f"{name} ({size}) must be a multiple of {_MULTIPLE}; the nearest are {near(size)}"
    return None


def near(size: int) -> str:
    """The multiples below and above ``size``, for a message."""
    below = size // _MULTIPLE * _MULTIPLE
    return f"{below} and {below + _MULTIPLE}" if below else str(_MULTIPLE)
