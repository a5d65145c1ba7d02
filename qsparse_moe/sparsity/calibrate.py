"""The magnitude below which the share S of what a site sees lies. D features of a row."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_VALUES = 2**18
"""Magnitudes kept of one place: 1 MiB. Of so many independent ones the S-quantile is within 0.001 of S (one sigma)."""


class RowSample:
    """A bounded sample of rows, evenly spaced over all that were shown and the same however they are cut into calls.

    Every row is kept until ``max_values`` magnitudes are; then every second one of them goes, and of the rows to come
    every second one is passed over, and so on.
    """

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self.max_values = max_values
        self.num_seen = 0
        self._stride = 1
        self._rows: Tensor | None = None

    def add(self, rows_ND: Tensor) -> None:
        """Show rows ``(N, D)``; their magnitudes are kept in fp32 on the CPU."""
        first = -self.num_seen % self._stride
        self.num_seen += len(rows_ND)
        rows = rows_ND[first :: self._stride].detach().abs().float().cpu()
        rows = rows if self._rows is None else torch.cat((self._rows, rows))
        while len(rows) > max(1, self.max_values // rows_ND.shape[-1]):
            rows = rows[::2]
            self._stride *= 2
        # A slice would keep the memory of what it was cut from.
        self._rows = rows.clone()

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
