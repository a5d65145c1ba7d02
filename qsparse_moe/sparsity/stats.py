"""Statistics of a sparse site: the effect of its selection on rows, as sums.

Sums can be added over layers, micro-batches, and ranks in any order; ratios are computed last, in ``metrics``. A
statistic that is a flag, such as whether a feature was used, is a bool tensor, and flags are combined with "or".

N rows, D features per row, E experts (1 at a site without experts), R readings of a row by the matrix of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.sparsity.log_counts import MAGNITUDES, log_counts

SITE_FIELDS = (
    "rows",
    "selected",
    "nonzero",
    "energy",
    "kept_energy",
    "smallest",
    "pairs_nonzero",
    "pairs_common",
)
"""The sums per expert, in order: number of rows; number of selected features, zeros among them included; number of
nonzero features after the selection; sum of squares before and after it; sum over rows of the smallest selected
magnitude; and, over the rows that the next row of the site continues, the number of their nonzero features and of those
that are nonzero in the next row as well."""

Stats = dict[str, Tensor]


class RowSums(NamedTuple):
    """Sums over the features of every row, ``(N,)`` each, in at least fp32."""

    nonzero_N: Tensor  # number of nonzero features after the selection
    energy_N: Tensor  # sum of squares before the selection
    kept_energy_N: Tensor  # sum of squares after the selection


class RowPattern(NamedTuple):
    """The pattern of nonzero features of rows, in at least fp32 except for the flags."""

    smallest_N: Tensor  # smallest nonzero magnitude; 0 in a row of zeros
    common_N: Tensor  # number of features that are nonzero in this row and the next; 0 in the last row
    used_ED: Tensor  # bool: whether the feature is nonzero in any row of the expert


class Readers(NamedTuple):
    """The rows that the matrix of each expert reads at a site: R readings, sorted by expert."""

    row_R: Tensor | None = None
    """The row of each reading; None if each row is read once, in order."""
    expert_R: Tensor | None = None
    """The expert of each reading; None if there is only one matrix, which counts as expert 0."""
    num_experts: int = 1
    continues_R: Tensor | None = None
    """Bool: whether the next reading is by the same expert, of the next token of the same sequence, in the next row.
    None if it is not known for any reading."""


def row_sums(before_ND: Tensor, after_ND: Tensor) -> RowSums:
    """Return the sums of rows ``(N, D)`` before and after a selection."""
    before_ND, after_ND, wide = before_ND.detach(), after_ND.detach(), _wide(after_ND)
    nonzero_N = (after_ND != 0).sum(-1).to(wide)
    return RowSums(nonzero_N, _energy(before_ND, wide), _energy(after_ND, wide))


def _energy(x_ND: Tensor, wide: torch.dtype) -> Tensor:
    # On CUDA the norm converts what it reads and stores nothing of the size of the rows, unlike a sum of squares.
    return torch.linalg.vector_norm(x_ND, dim=-1, dtype=wide).square_()


def row_pattern(after_ND: Tensor, readers: Readers) -> RowPattern:
    """Return the pattern of nonzero features of rows ``(N, D)`` after a selection."""
    # In the dtype of the rows where that is exact: a wider copy would take more memory than the rows.
    after_ND, wide = after_ND.detach(), _wide(after_ND)
    nonzero_ND = after_ND != 0
    smallest_N = after_ND.abs().masked_fill_(~nonzero_ND, torch.inf).amin(-1).to(wide)
    common_N = torch.zeros_like(smallest_N)
    # A row and the next one are compared here; readers.continues_R decides later which of these pairs count.
    common_N[:-1] = (nonzero_ND[:-1] & nonzero_ND[1:]).sum(-1).to(wide)
    read_RD = nonzero_ND if readers.row_R is None else nonzero_ND[readers.row_R]
    return RowPattern(
        smallest_N.masked_fill_(smallest_N == torch.inf, 0.0), common_N, _used(read_RD, readers, after_ND)
    )


def _used(read_RD: Tensor, readers: Readers, like: Tensor) -> Tensor:
    """Return ``(E, D)`` bool: whether the feature is nonzero in any reading of the expert."""
    if readers.expert_R is None:
        return read_RD.any(0, keepdim=True)
    # index_add_ does not support bool. In bf16 the counts stop at 256, and none of them falls back to 0.
    counts_ED = like.new_zeros(readers.num_experts, like.shape[-1])
    return counts_ED.index_add_(0, readers.expert_R, read_RD.to(like.dtype)) > 0


def site_stats(sums: RowSums, pattern: RowPattern, num_selected: int | Tensor, readers: Readers) -> Stats:
    """Return the statistics of a site: float64 sums per expert, flags, and a histogram.

    The sums ``(E,)`` have the names of ``SITE_FIELDS`` with the suffix ``_E``. ``used_ED`` marks the features that are
    nonzero in any row. ``smallest_counts_H`` counts the smallest selected magnitude of each row in ``MAGNITUDES``.

    Args:
        sums: the sums of the rows ``(N, D)``.
        pattern: the pattern of the same rows.
        num_selected: K, an int or one per row ``(N,)``.
        readers: which expert reads which row.
    """
    # A sum, because K is an int or a tensor, and fp32 either way: counts up to 2^24 are exact in it.
    num_selected_N = torch.zeros_like(sums.nonzero_N) + num_selected
    by_row_FN = torch.stack(
        (torch.ones_like(num_selected_N), num_selected_N, *sums, pattern.smallest_N, pattern.common_N)
    )
    fields_FR = by_row_FN if readers.row_R is None else by_row_FN[:, readers.row_R]
    continues_R = torch.zeros_like(fields_FR[0]) if readers.continues_R is None else readers.continues_R
    nonzero, common = SITE_FIELDS.index("nonzero"), len(fields_FR) - 1
    pairs_FR = torch.stack((fields_FR[nonzero], fields_FR[common])) * continues_R
    by_expert_FE = _sum_by_expert(torch.cat((fields_FR[:common], pairs_FR)), readers)
    by_name = {f"{name}_E": by_expert_FE[field] for field, name in enumerate(SITE_FIELDS)}
    # Over the readings, so that a row counts once for every expert that reads it.
    smallest_R = fields_FR[SITE_FIELDS.index("smallest")]
    return by_name | {"used_ED": pattern.used_ED, "smallest_counts_H": log_counts(smallest_R, MAGNITUDES)}


def _sum_by_expert(fields_FR: Tensor, readers: Readers) -> Tensor:
    # The rows are in fp32 and their sums in fp64, so that the rounding of a total does not grow with its rows.
    if readers.expert_R is None:
        return fields_FR.sum(1, keepdim=True, dtype=torch.float64)
    totals = torch.zeros(len(fields_FR), readers.num_experts, dtype=torch.float64, device=fields_FR.device)
    return totals.index_add_(1, readers.expert_R, fields_FR.double())


def add_stats(total: Stats, other: Stats) -> Stats:
    """Return the sums of both, flags combined with "or"; a name that only one of them has is included unchanged."""
    sums = dict(total)
    for name, value in other.items():
        sums[name] = add(sums[name], value) if name in sums else value
    return sums


def add(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of two tensors, or the "or" of two flags."""
    return one | other if one.dtype == torch.bool else one + other


def stack_layers(per_layer: list[Stats]) -> Stats:
    """Stack the statistics over the layers that have them: ``rows`` becomes ``rows_L``, and ``rows_E`` ``rows_LE``."""
    stacked: dict[str, list[Tensor]] = {}
    for stats in per_layer:
        for name, value in stats.items():
            stem, _, dims = name.rpartition("_") if value.dim() else (name, "", "")
            stacked.setdefault(f"{stem}_L{dims}", []).append(value)
    return {name: torch.stack(values) for name, values in stacked.items()}


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype of sums over ``x``: at least fp32, because bf16 cannot count beyond 256."""
    return torch.promote_types(x.dtype, torch.float32)
