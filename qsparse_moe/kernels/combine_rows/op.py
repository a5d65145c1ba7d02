"""The weighted sum of the rows of each token as an autograd operation. T tokens, A choices, N rows, D features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.kernels import native


@dataclass(frozen=True)
class CombineRows:
    """A named implementation.

    ``forward(rows_ND, row_TA, weights_TA or None) -> (T, D)`` computes ``reference.combine_rows``; without weights it
    is the plain sum. ``backward(grad_TD, rows_ND, weights_TA, slot_N)`` returns the gradients of the rows and of the
    weights, which are 0 for a choice without a row.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def combine_rows(rows_ND: Tensor, weights_TA: Tensor, row_TA: Tensor, slot_N: Tensor, *, by: CombineRows) -> Tensor:
    """Compute ``reference.combine_rows`` with ``by``."""
    # The products and sums are formed in fp32 even for bf16 rows, so the weights are not rounded to bf16.
    wide_TA = weights_TA.to(torch.promote_types(rows_ND.dtype, torch.float32))
    return _CombineRows.apply(rows_ND, wide_TA, row_TA, slot_N, by)


def combine_rows_torch(rows_ND: Tensor, weights_TA: Tensor, row_TA: Tensor, slot_N: Tensor) -> Tensor:
    """Compute ``combine_rows`` in stock PyTorch."""
    return combine_rows(rows_ND, weights_TA, row_TA, slot_N, by=TORCH)


def combine_rows_native(rows_ND: Tensor, weights_TA: Tensor, row_TA: Tensor, slot_N: Tensor) -> Tensor:
    """Compute ``combine_rows`` with the C++ operators."""
    native.load()
    return combine_rows(rows_ND, weights_TA, row_TA, slot_N, by=NATIVE)


def combine_rows_triton(rows_ND: Tensor, weights_TA: Tensor, row_TA: Tensor, slot_N: Tensor) -> Tensor:
    """Compute ``combine_rows`` with the Triton kernels."""
    return combine_rows(rows_ND, weights_TA, row_TA, slot_N, by=TRITON)


def _forward_torch(rows_ND: Tensor, row_TA: Tensor, weights_TA: Tensor | None) -> Tensor:
    """Sum choice by choice, so that only the rows of one choice exist in fp32 at a time."""
    total_TD: Tensor | None = None
    for choice in range(row_TA.shape[1]):
        part_TD = rows_ND.index_select(0, row_TA[:, choice])
        wide_TD = part_TD.to(torch.promote_types(rows_ND.dtype, torch.float32))
        if weights_TA is not None:
            wide_TD = wide_TD.mul_(weights_TA[:, choice, None])
        total_TD = wide_TD if total_TD is None else total_TD.add_(wide_TD)
    if total_TD is None:
        # The tokens have no rows: the sum of nothing, which the rows' gradient still reaches.
        return rows_ND.new_zeros(len(row_TA), rows_ND.shape[1])
    return total_TD.to(rows_ND.dtype)


def _backward_torch(grad_TD: Tensor, rows_ND: Tensor, weights_TA: Tensor, slot_N: Tensor) -> tuple[Tensor, Tensor]:
    token_N = slot_N.div(weights_TA.shape[1], rounding_mode="floor")
    grad_ND = grad_TD.index_select(0, token_N)
    # Rounded to the dtype of the rows, where the compiled implementations sum in fp32.
    dot_N = torch.linalg.vecdot(grad_ND, rows_ND).to(weights_TA.dtype)
    weight_N = weights_TA.flatten()[slot_N].to(grad_ND.dtype)
    # Not zeros_like, which has the strides of the weights, and slots count in order.
    grad_weights_S = weights_TA.new_zeros(weights_TA.numel())
    # slot_N leaves out the choices without a row, whose gradient stays 0.
    grad_weights_S[slot_N] = dot_N
    # In place, because index_select has made a new tensor.
    return grad_ND.mul_(weight_N[:, None]), grad_weights_S.view(weights_TA.shape)


def _forward_native(rows_ND: Tensor, row_TA: Tensor, weights_TA: Tensor | None) -> Tensor:
    weights_TA = None if weights_TA is None else weights_TA.contiguous()
    return torch.ops.qsparse_moe.combine_rows_forward(rows_ND.contiguous(), row_TA.contiguous(), weights_TA)


def _backward_native(grad_TD: Tensor, rows_ND: Tensor, weights_TA: Tensor, slot_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.qsparse_moe.combine_rows_backward(
        grad_TD.contiguous(), rows_ND.contiguous(), weights_TA.contiguous(), slot_N
    )


def _forward_triton(rows_ND: Tensor, row_TA: Tensor, weights_TA: Tensor | None) -> Tensor:
    # Imported here, because Triton is an optional dependency.
    from qsparse_moe.kernels.combine_rows import triton

    return triton.forward_triton(rows_ND, row_TA, weights_TA)


def _backward_triton(grad_TD: Tensor, rows_ND: Tensor, weights_TA: Tensor, slot_N: Tensor) -> tuple[Tensor, Tensor]:
    from qsparse_moe.kernels.combine_rows import triton

    return triton.backward_triton(grad_TD, rows_ND, weights_TA, slot_N)


TORCH = CombineRows("torch", _forward_torch, _backward_torch)
# 8192 rows of 512, two choices, fp32: forward 6.6 ms in torch and 2.4 in native, backward 10.3 and 3.0 (one thread of a
# Zen 3, lab log of 24 November 2026). No time of triton is known.
NATIVE = CombineRows("native", _forward_native, _backward_native)
TRITON = CombineRows("triton", _forward_triton, _backward_triton)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weights_TA: Tensor, row_TA: Tensor, slot_N: Tensor, by: CombineRows
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TA, slot_N)
        ctx.by = by
        return by.forward(rows_ND, row_TA, weights_TA)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_rows, grad_weights = ctx.by.backward(grad_TD, *ctx.saved_tensors)
        return grad_rows, grad_weights, None, None, None
