"""Sparse rows as lists of their nonzero features, and their products with chosen rows of matrices, in stock PyTorch.

L lists of M places, P products, E matrices of D rows and O columns. ``torch.nn.functional.embedding_bag`` reads only
the rows whose numbers it is given and adds them with weights, on a CPU without a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.kernels.row_product.lists import FeatureLists

# A bag is summed by one thread, so a list is divided into bags for all threads, and into as many whatever their number
# is, for equal sums everywhere. 1024 x 2048 in bf16, half of the rows, two threads of an AMD EPYC (family 25):
# 0.21 ms in one bag, 0.13 in two, 0.12 in eight.
_BAGS = 8


@dataclass(frozen=True)
class GatheredMatrices:
    """Stacks of E input-major matrices of the same shape, fp32 or bf16; the stacks follow one another."""

    stacks: tuple[Tensor, ...]
    """``(E, D, O)`` each, contiguous."""

    @property
    def num_matrices(self) -> int:
        """Number of matrices of all stacks."""
        return len(self.stacks) * len(self.stacks[0])


def list_features_gather(rows_LD: Tensor, capacity: int, *, with_zeros: bool = False) -> FeatureLists:
    """Return the nonzero features of every row, NaN included.

    Lists have as many places as the longest needs, rounded up to whole bags. Places beyond the length of a list hold
    feature 0 with value 0, so that a product may read them.

    Args:
        rows_LD: the sparse rows after a selection.
        capacity: not used, because the host knows the lengths: places are not reserved.
        with_zeros: whether all features are listed, for products that read every row of a matrix.
    """
    is_listed_LD = torch.ones_like(rows_LD, dtype=torch.bool) if with_zeros else rows_LD != 0
    lengths_L = is_listed_LD.sum(1)
    list_N, feature_N = is_listed_LD.nonzero(as_tuple=True)
    place_N = torch.arange(len(list_N), device=rows_LD.device) - (lengths_L.cumsum(0) - lengths_L)[list_N]
    places = -(-int(lengths_L.max()) // _BAGS) * _BAGS if len(list_N) else _BAGS
    features_LM = torch.zeros(len(rows_LD), places, dtype=torch.int64, device=rows_LD.device)
    values_LM = torch.zeros(len(rows_LD), places, dtype=torch.float32, device=rows_LD.device)
    features_LM[list_N, place_N] = feature_N
    values_LM[list_N, place_N] = rows_LD[is_listed_LD].float()
    return FeatureLists(features_LM, values_LM, lengths_L)


def listed_product_gather(
    matrices: GatheredMatrices,
    lists: FeatureLists,
    *,
    matrix_P: Tensor | None = None,
    products_per_list: int = 1,
    factors_P: Tensor | None = None,
    products_per_sum: int = 1,
) -> Tensor:
    """Return sums of products of lists with matrices, ``(P / products_per_sum, O)`` fp32.

    The arguments are those of ``triton.listed_product_triton``, but for the matrices: their products come in as many
    equal runs as there are stacks, each with matrices of its stack. Values are rounded to the dtype of the matrices,
    which the sums over the rows of a bag have as well.
    """
    num_lists = len(lists.lengths_L)
    if matrix_P is None:
        matrix_P = torch.zeros(num_lists * products_per_list, dtype=torch.int64, device=lists.features_LM.device)
    list_P = torch.arange(len(matrix_P), device=matrix_P.device) // products_per_list % num_lists
    parts = []
    runs = zip(matrix_P.chunk(len(matrices.stacks)), list_P.chunk(len(matrices.stacks)), strict=True)
    for number, (stack_EDO, (matrix_R, list_R)) in enumerate(zip(matrices.stacks, runs, strict=True)):
        first_row_R = (matrix_R - number * len(stack_EDO)) * stack_EDO.shape[1]
        row_RM = lists.features_LM[list_R] + first_row_R[:, None]
        parts.append(_bags(stack_EDO.flatten(0, 1), row_RM, lists.values_LM[list_R]))
    out_PO = torch.cat(parts) if len(parts) > 1 else parts[0]
    if factors_P is not None:
        out_PO = out_PO * factors_P[:, None]
    return out_PO if products_per_sum == 1 else out_PO.unflatten(0, (-1, products_per_sum)).sum(1)


def _bags(rows: Tensor, row_PM: Tensor, values_PM: Tensor) -> Tensor:
    """Return ``(P, O)`` fp32: for each product the sum over its places of the value times the row."""
    # Fewer bags per product where the products are many: adding the bags of a product costs time.
    bags = max(1, _BAGS // len(row_PM))
    # A power of two divides the places of a list, which are a multiple of _BAGS.
    bags = 1 << (bags.bit_length() - 1)
    # embedding_bag takes weights in the dtype of its rows only.
    values_PM = values_PM.to(rows.dtype)
    parts = F.embedding_bag(
        row_PM.view(len(row_PM) * bags, -1),
        rows,
        mode="sum",
        per_sample_weights=values_PM.view(len(row_PM) * bags, -1),
    ).float()
    return parts if bags == 1 else parts.view(len(row_PM), bags, -1).sum(1)
