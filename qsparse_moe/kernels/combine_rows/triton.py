"""The weighted sum of the rows of each token in Triton: one pass forward and one backward, in fp32, rounded once.

T tokens, A choices per token, N rows, D features; a tile is (R, C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsparse_moe.kernels.tiles import flat_tile, on_device_of, row_tile


# Differs from step to step; Triton would compile variants for values that are 1 or multiples of 16.
@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    rows_ptr,
    row_ptr,
    weights_ptr,
    out_ptr,
    num_tokens,
    num_features,
    WITH_WEIGHTS: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute one tile of tokens and features; the choices are added one after the other."""
    # int64, because row * num_features exceeds int32 for large batches.
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    token_is_real = tokens < num_tokens
    inside = token_is_real[:, None] & (columns < num_features)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(row_ptr + tokens * CHOICES + choice, mask=token_is_real, other=0)
        values = tl.load(rows_ptr + row[:, None] * num_features + columns, mask=inside, other=0.0).to(tl.float32)
        if WITH_WEIGHTS:
            weight = tl.load(weights_ptr + tokens * CHOICES + choice, mask=token_is_real, other=0.0)
            values = values * weight[:, None]
        total += values
    at = out_ptr + tokens[:, None] * num_features + columns
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    grad_ptr,
    rows_ptr,
    weights_ptr,
    slot_ptr,
    grad_rows_ptr,
    grad_weights_ptr,
    num_rows,
    num_features,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute one tile of whole rows: the gradient of the token times the weight, and its dot product with the row."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    row_is_real = rows < num_rows
    inside = row_is_real[:, None] & (columns < num_features)
    slot = tl.load(slot_ptr + rows, mask=row_is_real, other=0)
    weight = tl.load(weights_ptr + slot, mask=row_is_real, other=0.0)
    above = (slot // CHOICES)[:, None] * num_features + columns
    grad = tl.load(grad_ptr + above, mask=inside, other=0.0).to(tl.float32)
    at = rows[:, None] * num_features + columns
    values = tl.load(rows_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_rows_ptr + at, (grad * weight[:, None]).to(grad_rows_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_weights_ptr + slot, tl.sum(grad * values, 1), mask=row_is_real)


def forward_triton(rows_ND: Tensor, row_TA: Tensor, weights_TA: Tensor | None) -> Tensor:
    """Compute ``CombineRows.forward`` on an NVIDIA GPU or under the interpreter; fp16, bf16, and fp32."""
    (num_tokens, choices), num_features = row_TA.shape, rows_ND.shape[1]
    out = torch.empty(num_tokens, num_features, dtype=rows_ND.dtype, device=rows_ND.device)
    if not out.numel():
        return out
    tile = flat_tile(num_tokens, num_features)
    with on_device_of(rows_ND):
        forward_kernel[(triton.cdiv(num_tokens, tile.rows), triton.cdiv(num_features, tile.columns))](
            rows_ND.contiguous(),
            row_TA.contiguous(),
            None if weights_TA is None else weights_TA.contiguous(),
            out,
            num_tokens,
            num_features,
            WITH_WEIGHTS=weights_TA is not None,
            CHOICES=choices,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return out


def backward_triton(grad_TD: Tensor, rows_ND: Tensor, weights_TA: Tensor, slot_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``CombineRows.backward`` on an NVIDIA GPU or under the interpreter."""
    num_rows, num_features = rows_ND.shape
    grad_rows = torch.empty(num_rows, num_features, dtype=rows_ND.dtype, device=rows_ND.device)
    # Zeros, because no program writes the gradient of a choice without a row.
    grad_weights = torch.zeros(weights_TA.shape, dtype=weights_TA.dtype, device=weights_TA.device)
    if not grad_rows.numel():
        return grad_rows, grad_weights
    # Whole rows, because the gradient of a weight is the dot product over its row.
    tile = row_tile(num_rows, num_features)
    with on_device_of(rows_ND):
        backward_kernel[(triton.cdiv(num_rows, tile.rows),)](
            grad_TD.contiguous(),
            rows_ND.contiguous(),
            weights_TA.contiguous(),
            slot_N,
            grad_rows,
            grad_weights,
            num_rows,
            num_features,
            CHOICES=weights_TA.shape[1],
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return grad_rows, grad_weights
