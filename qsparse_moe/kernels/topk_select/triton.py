"""Row top-K by magnitude in Triton. N rows, D features; a tile is (R, C): R rows, C the power of two from D on.

As in ``cpu.cpp``: a magnitude is the bit pattern without its sign, read as an integer, so that the order of the
integers is that of the magnitudes and NaN lies above infinity. The K-th largest is found bit by bit from the top, in
registers, and the search ends when every row of the tile has a bound that exactly K magnitudes reach.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsparse_moe.kernels.tiles import on_device_of, row_tile

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def load_num_kept(num_kept_ptr, num_kept, rows, row_is_real, num_features, rows_per_k, PER_ROW: tl.constexpr):
    """``(R,)`` int32: K of every row; rows past the end keep all of their features, of which they have none."""
    if PER_ROW:
        wanted = tl.load(num_kept_ptr + rows // rows_per_k, mask=row_is_real, other=0).to(tl.int32)
    else:
        wanted = tl.zeros_like(rows).to(tl.int32) + num_kept
    return tl.where(row_is_real, wanted, num_features)


@triton.jit
def magnitude_of(bits, inside, NUM_BITS: tl.constexpr):
    """``(R, C)`` magnitudes of the bit patterns as int32, int64 for fp64; -1, which is below all, outside the rows."""
    wide = bits if NUM_BITS == 63 else bits.to(tl.int32)
    return tl.where(inside, wide & ((1 << NUM_BITS) - 1), -1)


@triton.jit
def keep_largest(magnitude, num_kept, num_features, NUM_BITS: tl.constexpr, ZEROS_MATTER: tl.constexpr):
    """``(R, C)`` bool: the ``num_kept`` largest of every row, of equal ones those with the lower index.

    Without ``ZEROS_MATTER`` zeros may be marked beyond K: their values are the same whether they are kept or not.
    """
    # A ReLU before the selection leaves many zeros: where at most K values are not zero, there is nothing to search.
    nonzero = tl.sum((magnitude > 0).to(tl.int32), 1)
    found = (nonzero == num_kept).to(magnitude.dtype)
    reached = tl.where(nonzero == num_kept, num_kept, num_features)
    bit = NUM_BITS - 1
    while (bit >= 0) & (tl.max(((reached != num_kept) & (nonzero > num_kept)).to(tl.int32), 0) > 0):
        candidate = found | (tl.full((), 1, magnitude.dtype) << bit)
        count = tl.sum((magnitude >= candidate[:, None]).to(tl.int32), 1)
        enough = count >= num_kept
        found = tl.where(enough, candidate, found)
        reached = tl.where(enough, count, reached)
        bit -= 1
    surplus = reached - num_kept
    if not ZEROS_MATTER:
        surplus = tl.where(found > 0, surplus, 0)
    keep = magnitude >= found[:, None]
    # Few rows have a tie at their bound, and counting along the row is the dearest step.
    if tl.max(surplus, 0) > 0:
        tied = (magnitude == found[:, None]).to(tl.int32)
        room = tl.sum(tied, 1) - surplus
        keep = (magnitude > found[:, None]) | ((tied > 0) & (tl.cumsum(tied, 1) <= room[:, None]))
    return keep & (magnitude >= 0)


@triton.jit(do_not_specialize=["num_kept", "num_rows", "rows_per_k"])
def select_kernel(
    x_ptr,
    kept_ptr,
    mask_ptr,
    num_kept_ptr,
    num_kept,
    num_rows,
    rows_per_k,
    num_features,
    PER_ROW: tl.constexpr,
    WITH_MASK: tl.constexpr,
    NUM_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of whole rows: read once, searched in registers, written once. ``x`` comes as integers."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_is_real = rows < num_rows
    inside = row_is_real[:, None] & (columns < num_features)[None, :]
    at = rows[:, None] * num_features + columns[None, :]
    bits = tl.load(x_ptr + at, mask=inside, other=0)
    wanted = load_num_kept(num_kept_ptr, num_kept, rows, row_is_real, num_features, rows_per_k, PER_ROW)
    magnitude = magnitude_of(bits, inside, NUM_BITS)
    keep = keep_largest(magnitude, wanted, num_features, NUM_BITS, WITH_MASK)
    tl.store(kept_ptr + at, tl.where(keep, bits, 0), mask=inside)
    if WITH_MASK:
        tl.store(mask_ptr + at, keep.to(tl.int8), mask=inside)


def select_rows_triton(x: Tensor, num_kept: int | Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """``TopKSelect.select_rows`` on an NVIDIA GPU, or on a CPU under Triton's interpreter; fp16, bf16, fp32 and fp64.

    Raises:
        ValueError: rows have more than ``tiles.MAX_FEATURES`` features.
    """
    x = x.contiguous()
    num_features = x.shape[-1]
    kept = torch.empty_like(x)
    mask = torch.empty(x.shape if with_mask else (0,), dtype=torch.bool, device=x.device)
    if x.numel() == 0:
        return kept, mask
    num_rows = x.numel() // num_features
    per_row, one, rows_per_k = k_arguments(num_kept)
    tile = row_tile(num_rows, num_features)
    integers = _INTEGERS[x.element_size()]
    with on_device_of(x):
        select_kernel[(triton.cdiv(num_rows, tile.rows),)](
            x.view(integers),
            kept.view(integers),
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
    return kept, mask


def k_arguments(num_kept: int | Tensor) -> tuple[Tensor | None, int, int]:
    """K as a kernel takes it: one number a row (or None), one for all rows, and how many rows share an entry.

    A K that was expanded over the groups of a row is read from its one entry; nothing is written out.
    """
    if not isinstance(num_kept, Tensor):
        return None, num_kept, 1
    if num_kept.dim() > 1 and num_kept.stride(-1) == 0:
        return num_kept[..., 0].contiguous(), 0, num_kept.shape[-1]
    return num_kept.contiguous(), 0, 1
