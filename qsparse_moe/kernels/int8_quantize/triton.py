"""Absmax int8 quantisation of rows in Triton, in one pass. N rows, D features; a tile is (R, C)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsparse_moe.kernels.tiles import on_device_of, row_tile
from qsparse_moe.sparsity.quantize import EPSILON, Quantized

_EPSILON = tl.constexpr(EPSILON)
# 1.5 * 2^23: fp32 values of this size are whole numbers, so that adding it rounds, halves to the even neighbour.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    num_rows,
    num_features,
    row_stride,
    DEQUANTIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of whole rows: the codes as they are and the scales, or codes times scale in the dtype of ``codes``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_is_real = rows < num_rows
    inside = row_is_real[:, None] & (columns < num_features)[None, :]
    x = tl.load(x_ptr + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    # The largest of the magnitudes' bits: a maximum of floats would drop a NaN, whose bits lie above infinity's.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    factor = tl.div_rn(tl.full((ROWS,), 127.0, tl.float32), largest + _EPSILON)
    # At most 127 by construction: there is nothing to clip.
    codes = (x * factor[:, None] + _ROUNDER) - _ROUNDER
    scale = tl.div_rn(largest, tl.full((ROWS,), 127.0, tl.float32))
    at = rows[:, None] * num_features + columns[None, :]
    if DEQUANTIZE:
        tl.store(codes_ptr + at, (codes * scale[:, None]).to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(codes_ptr + at, codes.to(tl.int8), mask=inside)
        tl.store(scale_ptr + rows, scale, mask=row_is_real)


def quantize_triton(x: Tensor) -> Quantized:
    """``quantize(x, "int8")`` with the codes stored as int8 and scales ``(*, 1)`` in fp32; it has no gradient.

    ``x`` is ``(*, D)`` in fp16, bf16 or fp32. The codes of a row whose scale is not finite mean nothing.

    Raises:
        ValueError: rows have more than ``tiles.MAX_FEATURES`` features.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    _launch(x.detach(), codes, scale)
    return Quantized(codes, scale)


def fake_quantize_triton(x: Tensor) -> Tensor:
    """``fake_quantize(x, "int8")`` for ``(*, D)`` in fp16, bf16 or fp32; the gradient passes straight through.

    Raises:
        ValueError: as ``quantize_triton``.
    """
    return _FakeQuantize.apply(x)


def _launch(x: Tensor, codes: Tensor, scale: Tensor | None) -> None:
    if not x.numel():
        return
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    num_rows, num_features = rows.shape
    tile = row_tile(num_rows, num_features)
    with on_device_of(x):
        quantize_kernel[(triton.cdiv(num_rows, tile.rows),)](
            rows,
            codes,
            scale,
            num_rows,
            num_features,
            rows.stride(0),
            DEQUANTIZE=scale is None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )


class _FakeQuantize(torch.autograd.Function):
    """Codes times scale forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rounded = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch(x, rounded, None)
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
