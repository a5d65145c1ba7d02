"""Load and sparsity of every single expert, which a mean over the experts hides. L layers, E experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qsparse_moe.sparsity.stats import SITE_FIELDS, Stats

EXPERT_SITES = ("expert_input", "expert_hidden")


def expert_ratios(stats: Stats) -> dict[str, Tensor]:
    """Return the ratios of every expert ``(L, E)`` by name, from the sums of ``ModelOutput.stats``.

    The sums of several batches or ranks may be added first (``sparsity.stats.add_stats``).

    Args:
        stats: sums of a forward pass with ``with_stats=True``; ratios whose sums are missing are left out.

    Returns:
        ``load``: routed tokens of an expert divided by the mean of its layer. For each of ``expert_input`` and
        ``expert_hidden``: ``SITE/kept_energy``, the sum of squares after the selection divided by the sum before it;
        ``SITE/zeros``, the fraction of zeros in front of the matrix; ``SITE/unused_features``, the fraction of features
        that were zero for every token. NaN for an expert that received no token.
    """
    ratios: dict[str, Tensor] = {}
    if "router/routed_LE" in stats:
        # In double as everywhere: counts of tokens over a long sum exceed the integers that fp32 holds.
        routed_LE = stats["router/routed_LE"].double()
        ratios["load"] = routed_LE / routed_LE.mean(-1, keepdim=True)
    for site in EXPERT_SITES:
        if f"sparsity/{site}/rows_LE" in stats:
            ratios |= _site_ratios(stats, site)
    return ratios


def expert_values(stats: Stats, layers: Sequence[int]) -> dict[str, Any]:
    """Return the ratios as they are written to ``metrics.jsonl``: JSON-able, six digits, None for NaN.

    Args:
        stats: the sums of a logged step.
        layers: numbers of the layers with experts, in order; each is one row of every table.
    """
    tables = {name: [[_digits(value) for value in row] for row in table.tolist()] for name, table in _items(stats)}
    return {"layers": list(layers), **tables} if tables else {}


def _items(stats: Stats) -> list[tuple[str, Tensor]]:
    return list(expert_ratios(stats).items())


def _digits(value: float) -> float | None:
    # All 17 digits would double the size of these tables, the largest part of the file.
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _site_ratios(stats: Stats, site: str) -> dict[str, Tensor]:
    sums = {name: stats[f"sparsity/{site}/{name}_LE"] for name in SITE_FIELDS}
    used_LED = stats[f"sparsity/{site}/used_LED"]
    features_LE = sums["rows"] * used_LED.shape[-1]
    # An expert without a token used no feature, which says nothing about its features.
    unused_LE = (~used_LED).double().mean(-1).masked_fill(sums["rows"] == 0, float("nan"))
    return {
        f"{site}/kept_energy": sums["kept_energy"] / sums["energy"],
        f"{site}/zeros": 1 - sums["nonzero"] / features_LE,
        f"{site}/unused_features": unused_LE,
    }
