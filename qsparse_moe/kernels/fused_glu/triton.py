"""Gated activation, selection, and row sums in Triton, fused into one pass forward and one backward.

N rows, F hidden features; a tile is (R, C). The arithmetic is fp32. The selection uses the activation as it is stored,
rounded to the dtype of the rows, so that it agrees with a selection by another implementation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsparse_moe.kernels.fused_glu.reference import ACTIVATIONS
from qsparse_moe.kernels.tiles import flat_tile, on_device_of, row_tile
from qsparse_moe.kernels.topk_select.triton import k_arguments, load_num_selected, magnitude_of, mark_largest

_RELU2GLU = tl.constexpr(0)
_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """Return ``relu(gate)^2 * up`` or ``silu(gate) * up``; a NaN stays a NaN."""
    if ACTIVATION == _RELU2GLU:
        # Not tl.maximum, which returns the other operand of a NaN.
        positive = tl.where(gate < 0, 0.0, gate)
        return positive * positive * up
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def activation_gradients(gate, up, grad, ACTIVATION: tl.constexpr):
    """Return the gradients of ``gate`` and ``up``."""
    if ACTIVATION == _RELU2GLU:
        positive = tl.where(gate < 0, 0.0, gate)
        through = grad * positive
        return 2.0 * through * up, through * positive
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    # silu(x) = x s(x) has the derivative s (1 + x (1 - s)), with s the sigmoid.
    return grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), grad * gate * sigmoid


# K and the number of routed tokens change from step to step; Triton would compile variants for values that are 1 or
# multiples of 16.
@triton.jit(do_not_specialize=["num_selected", "num_rows", "rows_per_k"])
def forward_kernel(
    gate_ptr,
    up_ptr,
    selected_ptr,
    mask_ptr,
    sums_ptr,
    num_selected_ptr,
    num_selected,
    num_rows,
    rows_per_k,
    num_features,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    PER_ROW: tl.constexpr,
    WITH_MASK: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute one tile of whole rows. The sums (4, N) are in the order of ``SelectionSums``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_is_real = rows < num_rows
    inside = row_is_real[:, None] & (columns < num_features)[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * up_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    # Rounded before the selection: other implementations select among the stored values, of which more are tied.
    dense = activate(gate, up, ACTIVATION).to(selected_ptr.dtype.element_ty)
    bits = dense.to(tl.int32 if NUM_BITS == 31 else tl.int16, bitcast=True)
    wanted = load_num_selected(num_selected_ptr, num_selected, rows, row_is_real, num_features, rows_per_k, PER_ROW)
    chosen = mark_largest(magnitude_of(bits, inside, NUM_BITS), wanted, num_features, NUM_BITS, WITH_MASK)
    selected = tl.where(chosen, dense, 0.0)
    at = rows[:, None] * num_features + columns[None, :]
    tl.store(selected_ptr + at, selected, mask=inside)
    if WITH_MASK:
        tl.store(mask_ptr + at, chosen.to(tl.int8), mask=inside)
    if WITH_SUMS:
        before, after = dense.to(tl.float32), selected.to(tl.float32)
        tl.store(sums_ptr + rows, wanted.to(tl.float32), mask=row_is_real)
        tl.store(sums_ptr + num_rows + rows, tl.sum((after != 0.0).to(tl.float32), 1), mask=row_is_real)
        tl.store(sums_ptr + 2 * num_rows + rows, tl.sum(before * before, 1), mask=row_is_real)
        tl.store(sums_ptr + 3 * num_rows + rows, tl.sum(after * after, 1), mask=row_is_real)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    gate_ptr,
    up_ptr,
    grad_ptr,
    mask_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    num_rows,
    num_features,
    gate_stride,
    up_stride,
    grad_stride,
    ACTIVATION: tl.constexpr,
    WITH_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute the gradients of one tile, recomputing the activation. Without a mask every feature gets a gradient."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < num_features)
    gate = tl.load(gate_ptr + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    at = rows * num_features + columns
    if WITH_MASK:
        grad = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, grad, 0.0)
    grad_gate, grad_up = activation_gradients(gate, up, grad, ACTIVATION)
    tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + at, grad_up.to(grad_up_ptr.dtype.element_ty), mask=inside)


def forward_triton(
    gate_NF: Tensor, up_NF: Tensor, num_selected: int | Tensor, activation: str, *, with_mask: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``FusedGLU.forward`` on an NVIDIA GPU or under the interpreter; fp16, bf16, and fp32."""
    num_rows, num_features = gate_NF.shape
    gate_NF, up_NF = _dense_rows(gate_NF), _dense_rows(up_NF)
    selected = torch.empty(num_rows, num_features, dtype=gate_NF.dtype, device=gate_NF.device)
    mask = torch.empty_like(selected if with_mask else selected[:0], dtype=torch.bool)
    sums = torch.empty(4, num_rows if with_sums else 0, device=gate_NF.device)
    if not selected.numel():
        return selected, mask, sums
    per_row, one, rows_per_k = k_arguments(num_selected)
    tile = row_tile(num_rows, num_features)
    with on_device_of(gate_NF):
        forward_kernel[(triton.cdiv(num_rows, tile.rows),)](
            gate_NF,
            up_NF,
            selected,
            mask.view(torch.int8) if with_mask else None,
            sums if with_sums else None,
            per_row,
            one,
            num_rows,
            rows_per_k,
            num_features,
            gate_NF.stride(0),
            up_NF.stride(0),
            ACTIVATION=_CODES[activation],
            PER_ROW=per_row is not None,
            WITH_MASK=with_mask,
            WITH_SUMS=with_sums,
            NUM_BITS=8 * gate_NF.element_size() - 1,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return selected, mask, sums


def backward_triton(
    gate_NF: Tensor, up_NF: Tensor, grad_NF: Tensor, mask_NF: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Compute ``FusedGLU.backward`` on an NVIDIA GPU or under the interpreter."""
    num_rows, num_features = gate_NF.shape
    gate_NF, up_NF, grad_NF = _dense_rows(gate_NF), _dense_rows(up_NF), _dense_rows(grad_NF)
    settings: dict[str, Any] = {"dtype": gate_NF.dtype, "device": gate_NF.device}
    grad_gate, grad_up = (torch.empty(num_rows, num_features, **settings) for _ in range(2))
    if not grad_gate.numel():
        return grad_gate, grad_up
    # The backward is element by element, so a program need not have a whole row.
    tile = flat_tile(num_rows, num_features)
    with on_device_of(gate_NF):
        backward_kernel[(triton.cdiv(num_rows, tile.rows), triton.cdiv(num_features, tile.columns))](
            gate_NF,
            up_NF,
            grad_NF,
            mask_NF.view(torch.int8) if mask_NF is not None else None,
            grad_gate,
            grad_up,
            num_rows,
            num_features,
            gate_NF.stride(0),
            up_NF.stride(0),
            grad_NF.stride(0),
            ACTIVATION=_CODES[activation],
            WITH_MASK=mask_NF is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return grad_gate, grad_up


def _dense_rows(x_NF: Tensor) -> Tensor:
    """Return the rows with contiguous features; the rows may have gaps, as the halves of a joint matrix do."""
    return x_NF if x_NF.stride(1) == 1 else x_NF.contiguous()
