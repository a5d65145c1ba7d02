"""Each expert's rows through oneDNN on a CPU, in row counts that recur. N rows, X and Y widths, E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels import onednn
from qsparse_moe.kernels.onednn import gemm
from qsparse_moe.moe.dispatch import RowCounts

# oneDNN compiles a kernel for every shape it meets. Loads differ at every step, so exact counts keep compiling:
# 128 rows, 512 x 768, bf16: 0.27 ms a product once compiled, 0.7 ms the first time. Rounded up to 16 they recur.
_ROUND = 16


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: RowCounts) -> Tensor:
    """``(N, Y)``: each expert's rows times its matrix."""
    return _GroupedMatmul.apply(rows_NX, weights_EXY, counts.as_list)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """The reason why it cannot run on ``device``, or None."""
    return onednn.why_not(device)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, weights_EXY: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows_NX, weights_EXY)
        ctx.counts = counts
        return _rows_times(rows_NX, weights_EXY, counts)

    @staticmethod
    def backward(ctx: Any, grad_NY: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_NX, weights_EXY = ctx.saved_tensors
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = _rows_times(grad_NY, weights_EXY.transpose(1, 2), ctx.counts)
        if ctx.needs_input_grad[1]:
            grad_weights = _outer(rows_NX, grad_NY, ctx.counts, weights_EXY)
        return grad_rows, grad_weights, None


def _rows_times(rows_NX: Tensor, weights_EXY: Tensor, counts: list[int]) -> Tensor:
    """Each expert's rows times its matrix.

    A rounded-up count reaches into the next expert's rows; that expert, coming later, writes over the surplus. Only
    the last rows of all have nothing behind them, so those counts that would reach past the end stay exact.
    """
    num_rows = len(rows_NX)
    out_NY = rows_NX.new_empty(num_rows, weights_EXY.shape[2])
    start = 0
    for count, weight_XY in zip(counts, weights_EXY.unbind(), strict=True):
        if count:
            end = start + _rounded(count)
            end = end if end <= num_rows else start + count
            gemm(rows_NX[start:end], weight_XY, out_NY[start:end])
        start += count
    return out_NY


def _outer(rows_NX: Tensor, grad_NY: Tensor, counts: list[int], like_EXY: Tensor) -> Tensor:
    """``(E, X, Y)``: each expert's rows, transposed, times the gradient of its results; zero where it had no rows."""
    out_EXY = torch.empty_like(like_EXY, memory_format=torch.contiguous_format)
    start = 0
    for count, out_XY in zip(counts, out_EXY.unbind(), strict=True):
        if count:
            rows, grad = (_zero_padded(part[start : start + count]) for part in (rows_NX, grad_NY))
            gemm(rows.T, grad, out_XY)
        else:
            out_XY.zero_()
        start += count
    return out_EXY


def _zero_padded(rows: Tensor) -> Tensor:
    """The rows, followed by zeros up to a rounded count."""
    missing = _rounded(len(rows)) - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def _rounded(count: int) -> int:
    return -(-count // _ROUND) * _ROUND
