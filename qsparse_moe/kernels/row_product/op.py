"""The product of chosen rows of a stored matrix with the values of T tokens. K chosen rows, D rows, O columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsparse_moe.kernels import native
from qsparse_moe.kernels.row_product.lists import FeatureLists
from qsparse_moe.kernels.row_product.stored import WEIGHT_FORMATS, StoredWeights, load_dense


def row_product_reference(stored: StoredWeights, rows_K: Tensor, values_KT: Tensor, *, which: int = 0) -> Tensor:
    """Return ``(T, O)``: for each token the sum over the chosen rows of its value times the row, in the values' dtype.

    Args:
        stored: the matrix, or a stack of them.
        rows_K: ``(K,)`` int32, the chosen rows of one matrix.
        values_KT: ``(K, T)``.
        which: the matrix of the stack.
    """
    return values_KT.T @ load_dense(stored, which)[rows_K.long()].to(values_KT.dtype)


def row_product_native(
    stored: StoredWeights,
    rows_K: Tensor,
    values_KT: Tensor,
    *,
    which: int = 0,
    step: float = 0.0,
    by_integers: bool = True,
) -> Tensor:
    """``row_product_reference`` in C++, for at most 8 tokens; values and sums are fp32.

    Args:
        stored: the matrix, or a stack of them.
        rows_K: ``(K,)`` int32, the chosen rows of one matrix.
        values_KT: ``(K, T)`` fp32.
        which: the matrix of the stack.
        step: unless 0, every value is a whole multiple of it between -128 and 127.
        by_integers: whether codes of int8 and ternary weights are multiplied as integers, on a processor with AVX-512
            VNNI. Values are then rounded to 15 bits, relative to the largest of 8 to 32 rows; with a ``step``, ternary
            products are exact.
    """
    matrix = native_matrix(stored)  # first, because it loads the library that registers the operator
    return torch.ops.qsparse_moe.row_product(matrix, which, rows_K, values_KT, step, by_integers)


def list_features(rows_ND: Tensor, capacity: int, *, with_zeros: bool = False) -> FeatureLists:
    """Return the nonzero features of every row; see ``triton.list_features_triton``, imported on the first call."""
    # Imported here, because Triton is an optional dependency.
    from qsparse_moe.kernels.row_product import triton

    return triton.list_features_triton(rows_ND, capacity, with_zeros=with_zeros)


def listed_product(stored: StoredWeights, lists: FeatureLists, **settings: Any) -> Tensor:
    """Return sums of products of lists with matrices of ``stored``; see ``triton.listed_product_triton``."""
    from qsparse_moe.kernels.row_product import triton

    return triton.listed_product_triton(stored, lists, **settings)


def native_matrix(stored: StoredWeights) -> Any:
    """Return the C++ view of ``stored``, which shares its memory. Compiles the decode library on first use.

    Raises:
        BackendUnavailable: it cannot be compiled.
    """
    native.load(native.DECODE)
    number = WEIGHT_FORMATS.index(stored.weight_format)
    return torch.classes.qsparse_moe.StoredMatrix(
        stored.data, number, stored.num_rows, stored.num_columns, stored.scales, stored.whole_bytes
    )
