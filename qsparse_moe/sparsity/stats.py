"""What a selection did to the rows of a site, as sums.

Sums added over layers, micro-batches and ranks are exact in any order; ratios are formed last, in ``metrics``. What is
no sum but a flag (a feature was used) is a bool tensor, and flags are added by "or".

N rows, D features of a row, E experts (1 at a site that has none), R readings of a row by an expert's matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.sparsity.log_counts import MAGNITUDES, log_counts

SITE_FIELDS = (
    "rows",
    "kept",
    "nonzero",
    "energy",
    "kept_energy",
    "smallest",
    "pairs_nonzero",
    "pairs_common",
)
"""Of every expert: rows; features chosen by the selection, zeros among them included; values that are not zero after
it; sums of squares before and after; the sum over rows of the smallest magnitude kept; over the rows that the next row
of the site continues, their values that are not zero, and those of them that are not zero in the next row either."""

Stats = dict[str, Tensor]


class RowSums(NamedTuple):
    """Sums over the features of every row, ``(N,)`` each, in at least fp32."""

    nonzero_N: Tensor  # values that are not zero after the selection
    energy_N: Tensor  # sum of squares before it
    kept_energy_N: Tensor  # and after


class RowPattern(NamedTuple):
    """What the places of a row's values say, in at least fp32 but for the flags."""

    smallest_N: Tensor  # the smallest magnitude that is not zero; 0 in a row of zeros
    common_N: Tensor  # values that are not zero here nor in the next row; 0 in the last row
    used_ED: Tensor  # bool: the feature was not zero in some row of the expert


class Readers(NamedTuple):
    """Which expert's matrix reads which row of a site, R readings in the order of the experts."""

    row_R: Tensor | None = None
    """The row; None: each row is read once, in order."""
    expert_R: Tensor | None = None
    """The expert; None: there is one matrix, and it counts as expert 0."""
    num_experts: int = 1
    continues_R: Tensor | None = None
    """bool, whether the next reading is the same expert's of the next token of the same sequence, which stands in the
    row below; None: of none it is known."""


def row_sums(before_ND: Tensor, after_ND: Tensor) -> RowSums:
    """The sums of rows before and after a selection, both ``(N, D)``."""
    before, after = _wide(before_ND), _wide(after_ND)
    return RowSums((after != 0).sum(-1).to(after.dtype), before.square().sum(-1), after.square().sum(-1))


def row_pattern(after_ND: Tensor, readers: Readers) -> RowPattern:
    """Where the values of rows ``(N, D)`` are after a selection."""
    after = _wide(after_ND)
    nonzero_ND = after != 0
    smallest_N = after.abs().masked_fill(~nonzero_ND, torch.inf).amin(-1)
    common_N = torch.zeros_like(smallest_N)
    common_N[:-1] = (nonzero_ND[:-1] & nonzero_ND[1:]).sum(-1).to(after.dtype)
    read_RD = nonzero_ND if readers.row_R is None else nonzero_ND[readers.row_R]
    counts_ED = torch.zeros(readers.num_experts, after.shape[-1], device=after.device)
    expert_R = torch.zeros_like(read_RD[:, 0], dtype=torch.long) if readers.expert_R is None else readers.expert_R
    counts_ED.index_add_(0, expert_R, read_RD.float())
    return RowPattern(smallest_N.masked_fill(smallest_N == torch.inf, 0.0), common_N, counts_ED > 0)


def site_stats(sums: RowSums, pattern: RowPattern, num_kept: int | Tensor, readers: Readers) -> Stats:
    """The sums of a site by expert, float64 ``(E,)`` under the names of ``SITE_FIELDS`` with ``_E``, and ``used_ED``;
    and ``smallest_counts_H``, the smallest magnitudes kept counted in the bins ``MAGNITUDES``.

    Args:
        sums: of the rows ``(N, D)``.
        pattern: of the rows.
        num_kept: K, an int or one a row ``(N,)``.
        readers: which expert reads which row.
    """
    kept_N = torch.zeros_like(sums.nonzero_N) + num_kept
    by_row_FN = torch.stack((torch.ones_like(kept_N), kept_N, *sums, pattern.smallest_N, pattern.common_N))
    fields_FR = by_row_FN if readers.row_R is None else by_row_FN[:, readers.row_R]
    continues_R = torch.zeros_like(fields_FR[0]) if readers.continues_R is None else readers.continues_R
    nonzero, common = SITE_FIELDS.index("nonzero"), len(fields_FR) - 1
    pairs_FR = torch.stack((fields_FR[nonzero], fields_FR[common])) * continues_R
    by_expert_FE = _sum_by_expert(torch.cat((fields_FR[:common], pairs_FR)), readers)
    by_name = {f"{name}_E": by_expert_FE[field] for field, name in enumerate(SITE_FIELDS)}
    smallest_R = fields_FR[SITE_FIELDS.index("smallest")]
    return by_name | {"used_ED": pattern.used_ED, "smallest_counts_H": log_counts(smallest_R, MAGNITUDES)}


def _sum_by_expert(fields_FR: Tensor, readers: Readers) -> Tensor:
    # Rows in fp32, their sums in fp64: the total does not depend on how many rows were added.
    if readers.expert_R is None:
        return fields_FR.sum(1, keepdim=True, dtype=torch.float64)
    totals = torch.zeros(len(fields_FR), readers.num_experts, dtype=torch.float64, device=fields_FR.device)
    return totals.index_add_(1, readers.expert_R, fields_FR.double())


def add_stats(total: Stats, other: Stats) -> Stats:
    """The sums of both, flags by "or"; a name that only one of them has is taken over."""
    sums = dict(total)
    for name, value in other.items():
        sums[name] = add(sums[name], value) if name in sums else value
    return sums


def add(one: Tensor, other: Tensor) -> Tensor:
    """The sum, or of flags the "or"."""
    return one | other if one.dtype == torch.bool else one + other


def stack_layers(per_layer: list[Stats]) -> Stats:
    """One tensor a name, stacked over the layers that have it: ``rows`` becomes ``rows_L``, ``rows_E`` ``rows_LE``."""
    stacked: dict[str, list[Tensor]] = {}
    for stats in per_layer:
        for name, value in stats.items():
            stem, _, dims = name.rpartition("_") if value.dim() else (name, "", "")
            stacked.setdefault(f"{stem}_L{dims}", []).append(value)
    return {name: torch.stack(values) for name, values in stacked.items()}


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
