"""What a selection did to the rows of a site, as sums.

Sums added over layers, micro-batches and ranks are exact in any order; ratios are formed last, in ``metrics``.
"""

from __future__ import annotations

import torch
from torch import Tensor

SITE_FIELDS = ("rows", "features", "kept", "nonzero", "energy", "kept_energy")

Stats = dict[str, Tensor]


def site_stats(before: Tensor, after: Tensor, num_kept: int | Tensor) -> Stats:
    """Sums over the rows of one site, float64 scalars by the names of ``SITE_FIELDS``.

    Args:
        before: ``(*, D)`` the dense rows.
        after: ``(*, D)`` what the projection reads, before any rescale.
        num_kept: K, an int or one a row ``(*)``.

    Returns:
        ``rows``; ``features`` (rows times D); ``kept`` (chosen by the selection, zeros among them included);
        ``nonzero`` (of the values in ``after``); ``energy`` and ``kept_energy`` (sums of squares before and after).
    """
    before, after = before.detach(), after.detach()
    num_features = before.shape[-1]
    rows = torch.tensor(before.numel() // num_features, dtype=torch.float64, device=before.device)
    kept = num_kept.sum().double() if isinstance(num_kept, Tensor) else rows * num_kept
    return {
        "rows": rows,
        "features": rows * num_features,
        "kept": kept,
        "nonzero": torch.count_nonzero(after).double(),
        "energy": _square_sum(before),
        "kept_energy": _square_sum(after),
    }


def stats_of_row_sums(
    kept_N: Tensor, nonzero_N: Tensor, energy_N: Tensor, kept_energy_N: Tensor, *, num_features: int
) -> Stats:
    """``site_stats`` of rows of ``num_features`` whose sums were formed already, in at least fp32, row by row."""
    rows = torch.tensor(len(kept_N), dtype=torch.float64, device=kept_N.device)
    by_row = {"kept": kept_N, "nonzero": nonzero_N, "energy": energy_N, "kept_energy": kept_energy_N}
    totals = {name: sums_N.sum(dtype=torch.float64) for name, sums_N in by_row.items()}
    return {"rows": rows, "features": rows * num_features} | totals


def add_stats(total: Stats, other: Stats) -> Stats:
    """The sums of both; a name that only one of them has is taken over."""
    sums = dict(total)
    for name, value in other.items():
        sums[name] = sums[name] + value if name in sums else value
    return sums


def stack_layers(per_layer: list[Stats]) -> Stats:
    """One tensor a name, stacked over the layers that have it: ``rows`` becomes ``rows_L``, ``rows_E`` ``rows_LE``."""
    stacked: dict[str, list[Tensor]] = {}
    for stats in per_layer:
        for name, value in stats.items():
            stem, _, dims = name.rpartition("_") if value.dim() else (name, "", "")
            stacked.setdefault(f"{stem}_L{dims}", []).append(value)
    return {name: torch.stack(values) for name, values in stacked.items()}


def _square_sum(x: Tensor) -> Tensor:
    # Rows in fp32, their sums in fp64: the total does not depend on how many rows were added.
    return x.float().square().sum(-1).double().sum()
