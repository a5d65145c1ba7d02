"""Row top-K by magnitude in Triton. N rows, D features; a tile (R, C) has R rows and C = D rounded to a power of two.

As in ``cpu.cpp``, a magnitude is the bit pattern without its sign, read as an integer: integers have the same order as
the magnitudes, with NaN above infinity. The K-th largest is determined bit by bit from the top, in registers, until
every row of the tile has a threshold that exactly K magnitudes reach.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsparse_moe.kernels.tiles import on_device_of, row_tile

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def load_num_selected(
    num_selected_ptr, num_selected, rows, row_is_real, num_features, rows_per_k, PER_ROW: tl.constexpr
):
    """Return ``(R,)`` int32: K of every row. Rows past the end get K = D, which ends their search at once."""
    if PER_ROW:
        wanted = tl.load(num_selected_ptr + rows // rows_per_k, mask=row_is_real, other=0).to(tl.int32)
    else:
        wanted = tl.zeros_like(rows).to(tl.int32) + num_selected
    return tl.where(row_is_real, wanted, num_features)


@triton.jit
def magnitude_of(bits, inside, NUM_BITS: tl.constexpr):
    """Return the magnitudes ``(R, C)`` as int32, or int64 for fp64; outside the rows -1, which is below all others."""
    wide = bits if NUM_BITS == 63 else bits.to(tl.int32)
    return tl.where(inside, wide & ((1 << NUM_BITS) - 1), -1)


@triton.jit
def mark_largest(magnitude, num_selected, num_features, NUM_BITS: tl.constexpr, ZEROS_MATTER: tl.constexpr):
    """Return ``(R, C)`` bool: the ``num_selected`` largest of every row, among equal ones those with the lower index.

    Without ``ZEROS_MATTER``, more than K features may be marked if the rest are zeros, whose values do not change.
    """
    # A ReLU before the selection leaves many zeros. If at most K values are nonzero, there is nothing to search.
    nonzero = tl.sum((magnitude > 0).to(tl.int32), 1)
    # 1 is the smallest magnitude above 0, so as a threshold it selects exactly the nonzero values.
    found = (nonzero == num_selected).to(magnitude.dtype)
    reached = tl.where(nonzero == num_selected, num_selected, num_features)
    bit = NUM_BITS - 1
    while (bit >= 0) & (tl.max(((reached != num_selected) & (nonzero > num_selected)).to(tl.int32), 0) > 0):
        candidate = found | (tl.full((), 1, magnitude.dtype) << bit)
        count = tl.sum((magnitude >= candidate[:, None]).to(tl.int32), 1)
        enough = count >= num_selected
        found = tl.where(enough, candidate, found)
        reached = tl.where(enough, count, reached)
        bit -= 1
    surplus = reached - num_selected
    if not ZEROS_MATTER:
        surplus = tl.where(found > 0, surplus, 0)
    chosen = magnitude >= found[:, None]
    # Few rows have a tie at their threshold, and the cumulative sum along the row is the most expensive step.
    if tl.max(surplus, 0) > 0:
        tied = (magnitude == found[:, None]).to(tl.int32)
        num_tied = tl.sum(tied, 1) - surplus
        chosen = (magnitude > found[:, None]) | ((tied > 0) & (tl.cumsum(tied, 1) <= num_tied[:, None]))
    return chosen & (magnitude >= 0)


# K and the number of rows change from step to step; Triton would compile variants for values that are 1 or multiples of
# 16.
@triton.jit(do_not_specialize=["num_selected", "num_rows", "rows_per_k"])
def select_kernel(
    x_ptr,
    selected_ptr,
    mask_ptr,
    num_selected_ptr,
    num_selected,
    num_rows,
    rows_per_k,
    num_features,
    PER_ROW: tl.constexpr,
    WITH_MASK: tl.constexpr,
    NUM_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Select in one tile of whole rows, read once and written once. ``x`` is passed as integers."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_is_real = rows < num_rows
    inside = row_is_real[:, None] & (columns < num_features)[None, :]
    at = rows[:, None] * num_features + columns[None, :]
    bits = tl.load(x_ptr + at, mask=inside, other=0)
    wanted = load_num_selected(num_selected_ptr, num_selected, rows, row_is_real, num_features, rows_per_k, PER_ROW)
    magnitude = magnitude_of(bits, inside, NUM_BITS)
    chosen = mark_largest(magnitude, wanted, num_features, NUM_BITS, WITH_MASK)
    tl.store(selected_ptr + at, tl.where(chosen, bits, 0), mask=inside)
    if WITH_MASK:
        tl.store(mask_ptr + at, chosen.to(tl.int8), mask=inside)


def select_rows_triton(x: Tensor, num_selected: int | Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """Compute ``TopKSelect.select_rows`` on an NVIDIA GPU or under the interpreter; fp16, bf16, fp32, and fp64.

    Raises:
        ValueError: rows have more than ``tiles.MAX_FEATURES`` features.
    """
    # The kernel takes no strides.
    x = x.contiguous()
    num_features = x.shape[-1]
    selected = torch.empty_like(x)
    mask = torch.empty(x.shape if with_mask else (0,), dtype=torch.bool, device=x.device)
    if x.numel() == 0:
        return selected, mask
    num_rows = x.numel() // num_features
    per_row, one, rows_per_k = k_arguments(num_selected)
    tile = row_tile(num_rows, num_features)
    # As integers: the kernel needs the bits alone, so one variant serves fp16 and bf16.
    integers = _INTEGERS[x.element_size()]
    with on_device_of(x):
        select_kernel[(triton.cdiv(num_rows, tile.rows),)](
            x.view(integers),
            selected.view(integers),
            mask.view(torch.int8) if with_mask else None,
            per_row,
            one,
            num_rows,
            rows_per_k,
            num_features,
            PER_ROW=per_row is not None,
            WITH_MASK=with_mask,
            NUM_BITS=8 * x.element_size() - 1,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
        )
    return selected, mask


def k_arguments(num_selected: int | Tensor) -> tuple[Tensor | None, int, int]:
    """Return K as kernel arguments: a tensor of K per row or None, one K for all rows, and the rows per entry.

    A K that was expanded over the groups of a row is passed as its single entry, so the expansion is never written to
    memory.
    """
    if not isinstance(num_selected, Tensor):
        return None, num_selected, 1
    if num_selected.dim() > 1 and num_selected.stride(-1) == 0:
        return num_selected[..., 0].contiguous(), 0, num_selected.shape[-1]
    return num_selected.contiguous(), 0, 1
