"""Sparse rows as lists of their nonzero features, and their products with chosen rows of stored matrices, in Triton.

L lists of M entries at most, P products, D rows of a matrix, O columns, N sparse rows; a tile is (R, C): R chosen rows,
C columns.

No shape and no launch depends on a value: a list has a fixed number of places and its length in device memory, and the
matrix of a product is read from device memory too. So the host never waits for the device, and a step can be captured
as a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsparse_moe.kernels.row_product.lists import FeatureLists
from qsparse_moe.kernels.row_product.stored import WEIGHT_FORMATS, StoredWeights
from qsparse_moe.kernels.tiles import on_device_of, power_of_two, row_tile

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "ternary": torch.int32}
_INT8 = tl.constexpr(WEIGHT_FORMATS.index("int8"))
_TERNARY = tl.constexpr(WEIGHT_FORMATS.index("ternary"))

# 256 columns of bf16 are 16 bytes for each of the 32 threads of a warp, the widest load; 16 rows give every thread of
# four warps four of these loads in flight. Chosen on paper: they have not been tuned on a GPU.
_ROWS = 16
_COLUMNS = 256
_NUM_WARPS = 4
# Four programs for each of the 132 multiprocessors of an H100. The same on every device, so that sums are split alike.
_PROGRAMS = 512
# For a split shorter than two tiles of rows, writing its partial sums costs more than it saves.
_SMALLEST_SPLIT = 2 * _ROWS


def list_features_triton(rows_ND: Tensor, capacity: int, *, with_zeros: bool = False) -> FeatureLists:
    """Return the nonzero features of every row, NaN included; one launch, one program per row.

    Args:
        rows_ND: the sparse rows after a selection, fp32 or bf16. Any selection, number format and rescale will do.
        capacity: M, at least the number of nonzero features of any row: K of an exact top-K, D for a selection by
            threshold. Features beyond it are dropped.
        with_zeros: whether all features are listed, for products that read every row of a matrix.

    Raises:
        ValueError: rows have more than ``tiles.MAX_FEATURES`` features.
    """
    num_rows, num_features = rows_ND.shape
    device, tile = rows_ND.device, row_tile(1, num_features)
    features_LM = torch.empty(num_rows, capacity, dtype=torch.int32, device=device)
    values_LM = torch.empty(num_rows, capacity, dtype=torch.float32, device=device)
    lengths_L = torch.empty(num_rows, dtype=torch.int32, device=device)
    if num_rows:
        with on_device_of(rows_ND):
            list_kernel[(num_rows,)](
                rows_ND.contiguous(),
                features_LM,
                values_LM,
                lengths_L,
                num_features,
                capacity,
                WITH_ZEROS=with_zeros,
                COLUMNS=tile.columns,
                num_warps=tile.num_warps,
            )
    return FeatureLists(features_LM, values_LM, lengths_L)


@triton.jit
def list_kernel(
    rows_ptr,
    features_ptr,
    values_ptr,
    lengths_ptr,
    num_features,
    capacity,
    WITH_ZEROS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row: the place of a feature is the number of listed ones before it."""
    # int64, because row * num_features exceeds int32 for large batches.
    row = tl.program_id(0).to(tl.int64)
    # One program has the whole row, because a place needs the number of all features before it.
    features = tl.arange(0, COLUMNS)
    inside = features < num_features
    values = tl.load(rows_ptr + row * num_features + features, mask=inside, other=0.0).to(tl.float32)
    listed = inside if WITH_ZEROS else values != 0.0
    places = tl.cumsum(listed.to(tl.int32), 0) - 1
    has_place = listed & (places < capacity)
    tl.store(features_ptr + row * capacity + places, features, mask=has_place)
    tl.store(values_ptr + row * capacity + places, values, mask=has_place)
    tl.store(lengths_ptr + row, tl.minimum(tl.sum(listed.to(tl.int32), 0), capacity))


def listed_product_triton(
    stored: StoredWeights,
    lists: FeatureLists,
    *,
    matrix_P: Tensor | None = None,
    products_per_list: int = 1,
    factors_P: Tensor | None = None,
    products_per_sum: int = 1,
) -> Tensor:
    """Return sums of products of lists with matrices, ``(P / products_per_sum, O)`` fp32; one launch for all products.

    Product p takes list ``(p // products_per_list) % L``: all experts of a token share its list, and the products with
    the up matrices, which come after those with the gate matrices, take the same lists again.

    Each program computes a tile of columns of a part of one product, so that one token fills a GPU. The parts of a
    product and the products of a sum are added by a second launch and not by atomic additions: the order of the terms
    is fixed, so equal inputs give equal bits, and the output needs no zeros beforehand.

    Args:
        stored: the matrices, on the device of the lists.
        lists: of sparse rows, with features below D.
        matrix_P: ``(P,)`` int64, the matrix of each product; None: matrix 0, for ``L * products_per_list`` products.
        products_per_list: number of neighbouring products with the same list.
        factors_P: ``(P,)`` fp32 factors of the products, such as routing weights; None: 1.
        products_per_sum: number of neighbouring products that are added.
    """
    num_lists, capacity = lists.features_LM.shape
    num_products = num_lists * products_per_list if matrix_P is None else len(matrix_P)
    assert num_products % products_per_sum == 0, (num_products, products_per_sum)
    weights = stored.data.view(_DTYPES[stored.weight_format])
    num_columns, device = stored.num_columns, lists.values_LM.device
    columns = min(_COLUMNS, power_of_two(num_columns))
    num_tiles = triton.cdiv(num_columns, columns)
    splits = _num_splits(num_products * num_tiles, capacity)
    # Not zeroed: every part is written, also that of a list which is too short for it.
    parts_PXO = torch.empty(num_products, splits, num_columns, dtype=torch.float32, device=device)
    if num_products:
        with on_device_of(lists.values_LM):
            product_kernel[(num_products, num_tiles, splits)](
                weights,
                stored.scales if len(stored.scales) else None,
                lists.features_LM,
                lists.values_LM,
                lists.lengths_L,
                None if matrix_P is None else matrix_P.contiguous(),
                None if factors_P is None else factors_P.contiguous(),
                parts_PXO,
                num_lists,
                products_per_list,
                capacity,
                stored.num_rows,
                num_columns,
                weights.shape[1],
                splits,
                FORMAT=WEIGHT_FORMATS.index(stored.weight_format),
                ROWS=_ROWS,
                COLUMNS=columns,
                num_warps=_NUM_WARPS,
            )
    parts_per_sum = products_per_sum * splits
    parts_RYO = parts_PXO.view(num_products // products_per_sum, parts_per_sum, num_columns)
    return parts_RYO[:, 0] if parts_per_sum == 1 else parts_RYO.sum(1)


def _num_splits(num_programs: int, capacity: int) -> int:
    """Return the number of parts of a list: enough to fill a GPU, unless the parts become too short for a program."""
    return max(1, min(triton.cdiv(_PROGRAMS, max(num_programs, 1)), triton.cdiv(capacity, _SMALLEST_SPLIT)))


@triton.jit
def load_weights(weights_ptr, first_row, features, is_real, columns, row_pitch, FORMAT: tl.constexpr):
    """``(R, C)`` fp32: stored weights without their scales; 0 outside of the list and of the stored columns."""
    rows = (first_row + features.to(tl.int64))[:, None] * row_pitch
    if FORMAT == _TERNARY:
        # Word w of a block of 256 columns holds column 16 s + w at bit 2 s; a row has `row_pitch` words of 16 columns.
        word = columns // 256 * 16 + columns % 16
        inside = is_real[:, None] & (word < row_pitch)[None, :]
        words = tl.load(weights_ptr + rows + word[None, :], mask=inside, other=0)
        codes = (words >> (columns % 256 // 16 * 2)[None, :]) & 3
        return tl.where(inside, codes.to(tl.float32) - 1.0, 0.0)
    inside = is_real[:, None] & (columns < row_pitch)[None, :]
    return tl.load(weights_ptr + rows + columns[None, :], mask=inside, other=0).to(tl.float32)


# These differ from step to step. Without the list, Triton would compile variants for values that are 1 or multiples of
# 16, in the middle of decoding.
@triton.jit(do_not_specialize=["num_lists", "products_per_list", "capacity", "splits"])
def product_kernel(
    weights_ptr,
    scales_ptr,
    features_ptr,
    values_ptr,
    lengths_ptr,
    matrix_ptr,
    factors_ptr,
    parts_ptr,
    num_lists,
    products_per_list,
    capacity,
    num_rows,
    num_columns,
    row_pitch,
    splits,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of columns of one part of one product."""
    product = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    place = (product // products_per_list) % num_lists
    length = tl.load(lengths_ptr + place)
    # Parts of equal length, whole tiles of rows but for the last.
    share = tl.cdiv(tl.cdiv(length, splits), ROWS) * ROWS
    begin = part * share
    end = tl.minimum(begin + share, length)
    matrix = tl.full((), 0, tl.int64)
    if matrix_ptr is not None:
        matrix = tl.load(matrix_ptr + product)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        is_real = at < end
        features = tl.load(features_ptr + place * capacity + at, mask=is_real, other=0)
        values = tl.load(values_ptr + place * capacity + at, mask=is_real, other=0.0)
        if FORMAT == _INT8:
            # The scale of a row goes into its one value, not into each of its columns.
            values *= tl.load(scales_ptr + matrix * num_rows + features, mask=is_real, other=0.0)
        weights = load_weights(weights_ptr, matrix * num_rows, features, is_real, columns, row_pitch, FORMAT)
        sums += values[:, None] * weights
    total = tl.sum(sums, 0)
    if FORMAT == _TERNARY:
        # One scale per matrix, which therefore multiplies the sum.
        total *= tl.load(scales_ptr + matrix)
    if factors_ptr is not None:
        total *= tl.load(factors_ptr + product)
    out = parts_ptr + (product * splits + part) * num_columns
    tl.store(out + columns, total, mask=columns < num_columns)
