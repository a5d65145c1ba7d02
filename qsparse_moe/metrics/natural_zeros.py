"""Sites where a run's activation function produces more zeros than its selection asks for. Imports no torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsparse_moe.config.labels import place_label
from qsparse_moe.config.schema import SITES, Site
from qsparse_moe.metrics.jsonl import read_metrics

logger = logging.getLogger(__name__)

# ReLU²GLU leaves 0.675 zeros at S 0.5. Rounding of K and differences between rows move the mean by less than this.
_MARGIN = 0.02


@dataclass(frozen=True)
class NaturalZeros:
    """A site of some layers at which S lies below the fraction of zeros that the activation function produces."""

    site: Site
    layers: tuple[int, ...]
    """The layers concerned; empty if it is so in every layer that has the site."""
    zeros: float
    """Measured fraction of zeros in front of the matrix, mean over these layers."""
    chosen: float
    """Fraction that the selection set to zero: S after rounding to whole features."""

    @property
    def place(self) -> str:
        """The layers and the site in words."""
        return place_label(layers=self.layers or None, site=self.site)


def natural_zeros(row: Mapping[str, Any]) -> list[NaturalZeros]:
    """Return the sites whose zeros exceed those that the selection chose.

    Exact top-K leaves exactly S zeros unless a row had more of its own. There, a smaller S changes nothing.

    Args:
        row: a logged step of ``metrics.jsonl``.
    """
    return [found for site in SITES if (found := _natural_zeros_of(row, site)) is not None]


def _natural_zeros_of(row: Mapping[str, Any], site: Site) -> NaturalZeros | None:
    # By layer where the row has such values: in the mean, the other layers hide a single layer with another S.
    pattern = re.compile(rf"sparsity/{site}/zeros/layer_([0-9]+)")
    layers = sorted(int(match[1]) for name in row if (match := pattern.fullmatch(name)))
    endings: dict[int | None, str] = {layer: f"/layer_{layer}" for layer in layers}
    pairs = {layer: _pair(row, site, ending) for layer, ending in (endings or {None: ""}).items()}
    above = {layer: pair for layer, pair in pairs.items() if pair is not None and pair[0] > pair[1] + _MARGIN}
    if not above:
        return None
    zeros, chosen = (sum(values) / len(above) for values in zip(*above.values(), strict=True))
    concerned = () if len(above) == len(pairs) else tuple(layer for layer in above if layer is not None)
    return NaturalZeros(site, concerned, zeros, chosen)


def _pair(row: Mapping[str, Any], site: str, ending: str) -> tuple[float, float] | None:
    zeros, chosen = row.get(f"sparsity/{site}/zeros{ending}"), row.get(f"sparsity/{site}/zeros_chosen{ending}")
    return None if zeros is None or chosen is None else (zeros, chosen)


def natural_zeros_warning(found: NaturalZeros) -> str:
    """Return the finding as a sentence for a log or a report."""
    return (
        f"{found.place}: {found.zeros:.3f} of the features are zero, but S asks for only {found.chosen:.3f}: the "
        f"activation function produces the others, so an S below about {found.zeros:.2f} changes little there"
    )


def warn_of_natural_zeros(run_dir: Path) -> None:
    """Log a warning for every site of the run's last logged step at which S lies below the natural zeros."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    for found in natural_zeros(rows[-1]) if rows else ():
        logger.warning("%s", natural_zeros_warning(found))
