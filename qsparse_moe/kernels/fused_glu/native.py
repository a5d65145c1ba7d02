"""The implementation of ``op.FusedGLU`` by the C++ operators of ``fused_glu.cpp``. N rows, F hidden features."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.kernels import native
from qsparse_moe.kernels.fused_glu.reference import ACTIVATIONS

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def forward_native(
    gate_NF: Tensor, up_NF: Tensor, num_selected: int | Tensor, activation: str, *, with_mask: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``FusedGLU.forward`` on a CPU, in fp16, bf16, fp32, or fp64 (with sums in fp64)."""
    native.load()
    # The operator reads K as contiguous int64, and callers may have any integer dtype.
    per_row = num_selected.long().contiguous() if isinstance(num_selected, Tensor) else None
    one = 0 if isinstance(num_selected, Tensor) else num_selected
    return torch.ops.qsparse_moe.fused_glu_forward(
        _dense_rows(gate_NF), _dense_rows(up_NF), one, per_row, _CODES[activation], with_mask, with_sums
    )


def backward_native(
    gate_NF: Tensor, up_NF: Tensor, grad_NF: Tensor, mask_NF: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Compute ``FusedGLU.backward`` on a CPU."""
    return torch.ops.qsparse_moe.fused_glu_backward(
        _dense_rows(gate_NF), _dense_rows(up_NF), _dense_rows(grad_NF), mask_NF, _CODES[activation]
    )


def _dense_rows(x_NF: Tensor) -> Tensor:
    # The operators accept any distance between rows, but the features of a row must be contiguous.
    return x_NF if x_NF.stride(1) == 1 else x_NF.contiguous()
