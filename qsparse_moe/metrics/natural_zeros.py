"""Where a run's activation function produces more zeros than its selection asks for. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsparse_moe.config.schema import SITES
from qsparse_moe.metrics.jsonl import read_metrics

logger = logging.getLogger(__name__)

# ReLU²GLU leaves 0.675 zeros at S 0.5; rounding of K and rows that differ move the mean by less than this.
_MARGIN = 0.02


def natural_zeros(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence for every site whose zeros exceed those that the selection chose, by site.

    Exact top-K leaves exactly S zeros unless a row had more of its own. There, a smaller S changes nothing.

    Args:
        row: a logged step of ``metrics.jsonl``.
    """
    found: dict[str, str] = {}
    for site in SITES:
        zeros, chosen = row.get(f"sparsity/{site}/zeros"), row.get(f"sparsity/{site}/zeros_chosen")
        if zeros is not None and chosen is not None and zeros > chosen + _MARGIN:
            found[site] = (
                f"{site}: {zeros:.3f} of the features are zero, and S asks for {chosen:.3f} only: the activation "
                f"function produces the others, so that an S below about {zeros:.2f} changes little there"
            )
    return found


def warn_of_natural_zeros(run_dir: Path) -> None:
    """Log a warning for every site of the run's last logged step at which S lies below the natural zeros."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    for sentence in natural_zeros(rows[-1]).values() if rows else ():
        logger.warning("%s", sentence)
