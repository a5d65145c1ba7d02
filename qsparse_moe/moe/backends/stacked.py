"""One product per expert, written directly into the stacked result. N rows, X and Y widths, E experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """A matrix product and the multiple to which row counts are rounded.

    ``gemm(a, b, out)`` writes ``a @ b`` into ``out``; all three may have any strides.
    """

    gemm: Callable[[Tensor, Tensor, Tensor], None]
    round_to: int = 1


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: list[int], *, by: Products) -> Tensor:
    """Return ``(N, Y)``: the rows of each expert times its matrix."""
    return _StackedMatmul.apply(rows_NX, weights_EXY, counts, by)


class _StackedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, weights_EXY: Tensor, counts: list[int], by: Products) -> Tensor:
        ctx.save_for_backward(rows_NX, weights_EXY)
        ctx.counts, ctx.by = counts, by
        return _rows_times(rows_NX, weights_EXY, counts, by)

    @staticmethod
    def backward(ctx: Any, grad_NY: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_NX, weights_EXY = ctx.saved_tensors
        # Frozen weights, and the input of the first layer, need no product.
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = _rows_times(grad_NY, weights_EXY.transpose(1, 2), ctx.counts, ctx.by)
        if ctx.needs_input_grad[1]:
            grad_weights = _outer(rows_NX, grad_NY, weights_EXY, ctx.counts, ctx.by)
        return grad_rows, grad_weights, None, None


def _rows_times(rows_NX: Tensor, weights_EXY: Tensor, counts: list[int], by: Products) -> Tensor:
    """Return the rows of each expert times its matrix.

    A count that is rounded up includes rows of the next expert, which overwrites their results afterwards. At the end
    of the tensor no rows follow, so a count that would exceed it stays exact.
    """
    num_rows = len(rows_NX)
    out_NY = rows_NX.new_empty(num_rows, weights_EXY.shape[2])
    start = 0
    for count, weight_XY in zip(counts, weights_EXY.unbind(), strict=True):
        if count:
            end = start + _rounded(count, by.round_to)
            end = end if end <= num_rows else start + count
            by.gemm(rows_NX[start:end], weight_XY, out_NY[start:end])
        start += count
    return out_NY


def _outer(rows_NX: Tensor, grad_NY: Tensor, like_EXY: Tensor, counts: list[int], by: Products) -> Tensor:
    """Return ``(E, X, Y)``: the transposed rows of each expert times the gradient of its results; zero without rows."""
    # In the layout of the weights, which may be a transposed view: autograd would copy a gradient in another one.
    out_EXY = torch.empty_like(like_EXY)
    start = 0
    for count, out_XY in zip(counts, out_EXY.unbind(), strict=True):
        if count:
            rows, grad = (_zero_padded(part[start : start + count], by.round_to) for part in (rows_NX, grad_NY))
            by.gemm(rows.T, grad, out_XY)
        else:
            # empty_like leaves the memory of an expert without tokens as it was.
            out_XY.zero_()
        start += count
    return out_EXY


def _zero_padded(rows: Tensor, round_to: int) -> Tensor:
    """Return the rows with zeros appended up to a rounded count: a sum over rows must not include the next expert's."""
    missing = _rounded(len(rows), round_to) - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _rounded(count: int, round_to: int) -> int:
    return -(-count // round_to) * round_to
