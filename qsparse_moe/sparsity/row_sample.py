"""The magnitude below which the share S of what a site sees lies. D features of a row."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_VALUES = 2**18
"""Magnitudes kept of one place: 1 MiB. Of so many independent ones the S-quantile is within 0.001 of S (one sigma)."""


# Multiples of the golden ratio's fraction fall evenly into [0, 1), and so do those of them below any bound: 2^64 times
# it, odd, as a signed integer. A power of two as the distance would only ever see the same positions of a text row.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class RowSample:
    """A bounded sample of numbered rows: those whose numbers come first in one fixed order of all numbers.

    Of rows numbered without gaps it keeps evenly spaced ones. What is kept depends on the numbers alone: not on the
    order in which rows are shown, how they are cut into calls, or which of several merged samples was shown them.
    """

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self.max_values = max_values
        """Magnitudes kept at most, but one row at least."""
        self.num_seen = 0
        """Rows that were shown."""
        self._order = torch.empty(0, dtype=torch.int64)
        self._rows: Tensor | None = None

    def add(self, rows_ND: Tensor, numbers_N: Tensor) -> None:
        """Show rows ``(N, D)`` and their numbers, int64, at least 0, each once; magnitudes are kept as fp32 on the CPU.

        Both must be on one device.
        """
        self.num_seen += len(rows_ND)
        order_N, indices_N = (numbers_N * _GOLDEN).sort()  # what overflows wraps round, which is meant
        num_wanted = min(len(rows_ND), self._max_rows(rows_ND))
        if len(self._order) == self._max_rows(rows_ND):  # most of what comes now is too late, and stays where it is
            num_wanted = min(num_wanted, int((order_N < self._order[-1]).sum()))
        if num_wanted:
            rows = rows_ND.detach()[indices_N[:num_wanted]]
            self._keep(order_N[:num_wanted].cpu(), rows.abs().float().cpu())

    def merge(self, other: RowSample) -> None:
        """Take over what another sample was shown; the numbers of the two must differ."""
        self.num_seen += other.num_seen
        if other._rows is not None:
            self._keep(other._order, other._rows)

    def _keep(self, order: Tensor, rows: Tensor) -> None:
        if self._rows is not None:
            order, rows = torch.cat((self._order, order)), torch.cat((self._rows, rows))
        self._order, indices = order.sort()
        first = indices[: self._max_rows(rows)]
        self._order, self._rows = self._order[: len(first)].clone(), rows[first]

    def _max_rows(self, rows_ND: Tensor) -> int:
        return max(1, self.max_values // rows_ND.shape[-1])

    def magnitudes(self) -> Tensor:
        """All that is kept, ``(n,)`` fp32; nothing where no row was shown."""
        return torch.empty(0) if self._rows is None else self._rows.flatten()


def calibrated_threshold(magnitudes: Tensor, sparsity: float) -> float:
    """The largest of the ``round(S * n)`` smallest magnitudes: those above it are the share 1 - S, ties aside.

    With natural zeros beyond S it is 0, which drops them all: they would contribute nothing.

    Args:
        magnitudes: ``(n,)``, n at least 1, none negative.
        sparsity: S in [0, 1).

    Returns:
        The threshold, at least 0; 0 where ``round(S * n)`` is 0.

    Raises:
        ValueError: there is nothing to calibrate on, or a magnitude is NaN or infinite.
    """
    if not len(magnitudes):
        raise ValueError("magnitudes must hold at least one value, got none")
    if not magnitudes.isfinite().all():
        raise ValueError("magnitudes must be finite, got NaN or infinity")
    num_dropped = round(sparsity * len(magnitudes))
    return magnitudes.kthvalue(num_dropped).values.item() if num_dropped else 0.0
