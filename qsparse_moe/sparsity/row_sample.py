"""Calibration of a threshold: a sample of the rows of a site, and the S-quantile of its magnitudes.

N rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_VALUES = 2**18
"""Maximum number of magnitudes per sample: 1 MiB. With so many independent values, the fraction of magnitudes below
the S-quantile of the sample is within 0.001 of S (one standard deviation)."""

# Multiples of the fractional part of the golden ratio are spread evenly over [0, 1), and so are those below any limit.
# The constant is that fraction times 2^64, made odd, as a signed integer. With a power of two as the stride, a sample
# would contain only the same few positions of every sequence.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class RowSample:
    """A sample of limited size of numbered rows: those that come first in a fixed order of all numbers.

    Of rows that are numbered without gaps it stores evenly spaced ones. The choice depends on the numbers alone: not on
    the order in which rows are added, on how they are split into calls, or on which of several merged samples received
    them.
    """

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self.max_values = max_values
        """Maximum number of stored magnitudes; at least one row is stored regardless."""
        self.num_seen = 0
        """Number of rows that were added, whether stored or not."""
        self._order = torch.empty(0, dtype=torch.int64)
        self._rows: Tensor | None = None

    def add(self, rows_ND: Tensor, numbers_N: Tensor) -> None:
        """Add rows. The magnitudes of the chosen ones are stored in fp32 on the CPU.

        Args:
            rows_ND: the rows.
            numbers_N: their numbers on the same device: int64, at least 0, and each used only once per sample.
        """
        self.num_seen += len(rows_ND)
        order_N, indices_N = (numbers_N * _GOLDEN).sort()  # the overflow is intended: the product modulo 2^64
        num_wanted = min(len(rows_ND), self._max_rows(rows_ND))
        # Once the sample is full, most rows come too late in the order, and copying them to the CPU would cost the
        # most.
        if len(self._order) == self._max_rows(rows_ND):  # full: copy only rows that displace others
            num_wanted = min(num_wanted, int((order_N < self._order[-1]).sum()))
        if num_wanted:
            rows = rows_ND.detach()[indices_N[:num_wanted]]
            self._store(order_N[:num_wanted].cpu(), rows.abs().float().cpu())

    def merge(self, other: RowSample) -> None:
        """Add the rows of another sample; the numbers of the two must be disjoint."""
        self.num_seen += other.num_seen
        if other._rows is not None:
            self._store(other._order, other._rows)

    def _store(self, order: Tensor, rows: Tensor) -> None:
        if self._rows is not None:
            order, rows = torch.cat((self._order, order)), torch.cat((self._rows, rows))
        self._order, indices = order.sort()
        first = indices[: self._max_rows(rows)]
        # A clone, because a view would keep the memory of the whole sorted tensor.
        self._order, self._rows = self._order[: len(first)].clone(), rows[first]

    def _max_rows(self, rows_ND: Tensor) -> int:
        return max(1, self.max_values // rows_ND.shape[-1])

    def magnitudes(self) -> Tensor:
        """Return all stored magnitudes, ``(n,)`` in fp32; n is 0 if no row was added."""
        return torch.empty(0) if self._rows is None else self._rows.flatten()


def calibrated_threshold(magnitudes: Tensor, sparsity: float) -> float:
    """Return the largest of the ``round(S * n)`` smallest magnitudes: a fraction 1 - S lies above it, ties aside.

    If more than a fraction S of the magnitudes is zero, the threshold is 0, which drops only zeros.

    Args:
        magnitudes: ``(n,)``, n at least 1, none negative.
        sparsity: S in [0, 1).

    Returns:
        The threshold, at least 0; 0 if ``round(S * n)`` is 0.

    Raises:
        ValueError: there are no magnitudes, or one of them is NaN or infinite.
    """
    if not len(magnitudes):
        raise ValueError("magnitudes must hold at least one value, got none")
    if not magnitudes.isfinite().all():
        raise ValueError("magnitudes must be finite, got NaN or infinity")
    num_dropped = round(sparsity * len(magnitudes))
    # A magnitude of the sample and no interpolated quantile, so that the fraction below it is exact, ties aside.
    return magnitudes.kthvalue(num_dropped).values.item() if num_dropped else 0.0
