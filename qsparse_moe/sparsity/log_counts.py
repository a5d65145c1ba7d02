"""Histograms over fixed logarithmic bins. Their counts are sums like all other statistics, so they can be added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogBins(NamedTuple):
    """H bins of equal width from ``low`` to ``high`` in log2; values beyond count in the first or the last bin."""

    low: int
    high: int
    per_octave: int

    @property
    def number(self) -> int:
        """Number of bins H."""
        return (self.high - self.low) * self.per_octave

    @property
    def edges(self) -> list[float]:
        """The H + 1 edges of the bins in log2."""
        return [self.low + index / self.per_octave for index in range(self.number + 1)]


# Eighths of an octave: at half octaves a trained site's thresholds filled two bins, which shows no shape. torch.histc
# takes the same time for 64 and 256 bins.
PROBABILITIES = LogBins(-20, 0, 8)
MAGNITUDES = LogBins(-24, 8, 8)


def log_counts(values: Tensor, bins: LogBins) -> Tensor:
    """Return ``(H,)`` float64 counts of ``values``, without waiting for the device.

    Values may have any shape and must not be negative; a 0 counts in the first bin.
    """
    # Zero becomes -inf, which the clamp puts into the first bin.
    logs = values.detach().double().log2().clamp(bins.low, bins.high)
    return torch.histc(logs, bins=bins.number, min=bins.low, max=bins.high)
