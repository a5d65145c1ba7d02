"""Fake int8 quantisation of rows in Triton, in one pass. N rows, D features; a tile is (R, C).

A value halfway between two codes is rounded as ``quantize`` rounds it only if every operation is the same as there: the
factor is ``1 / (g + e)`` times 127, as PyTorch computes ``127 / x``, and no product is fused with a sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsparse_moe.kernels.tiles import on_device_of, row_tile
from qsparse_moe.sparsity.quantize import EPSILON

_EPSILON = tl.constexpr(EPSILON)
# 1.5 * 2^23: fp32 values of this magnitude are integers, so adding it rounds, halves to the even neighbour.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["num_rows"])
def fake_quantize_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    num_features,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute one tile of whole rows: codes times scale, in the dtype of ``out``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < num_features)[None, :]
    x = tl.load(x_ptr + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    # The maximum of the bit patterns: a maximum of floats would drop a NaN, whose bits are above those of infinity.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    # div_rn, because the operator / of Triton is not rounded correctly in fp32.
    factor = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), largest + _EPSILON) * 127.0
    # At most 127 by construction, so nothing has to be clipped.
    codes = (x * factor[:, None] + _ROUNDER) - _ROUNDER
    scale = tl.div_rn(largest, tl.full((ROWS,), 127.0, tl.float32))
    at = rows[:, None] * num_features + columns[None, :]
    tl.store(out_ptr + at, (codes * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def fake_quantize_triton(x: Tensor) -> Tensor:
    """Compute ``fake_quantize(x, "int8")`` for rows ``(*, D)`` in fp16, bf16, or fp32.

    Raises:
        ValueError: rows have more than ``tiles.MAX_FEATURES`` features.
    """
    return _FakeQuantize.apply(x)


def _rounded(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    num_rows, num_features = rows.shape
    tile = row_tile(num_rows, num_features)
    with on_device_of(x):
        fake_quantize_kernel[(triton.cdiv(num_rows, tile.rows),)](
            rows,
            out,
            num_rows,
            num_features,
            rows.stride(0),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
            # Fused, x * factor + rounder would leave out the rounding of the product: halves would get other codes than
            # in quantize.
            enable_fp_fusion=False,
        )
    return out


class _FakeQuantize(torch.autograd.Function):
    """Codes times scale forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _rounded(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
