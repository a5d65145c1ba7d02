"""What only several logged steps together say: experts without a row, features without a use, a threshold that moves.

The window spans the last logged steps of this process; a resumed run begins a new one. L layers, E experts, D features.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from qsparse_moe.sparsity.stats import Stats

LENGTH = 10
"""Logged steps. With the default interval of 10 that is a hundred steps."""


class Window:
    """The last ``length`` logged steps; for dead experts the last ``expert_length``, and nothing where that is 0."""

    def __init__(self, length: int = LENGTH, expert_length: int | None = None) -> None:
        self._expert_length = length if expert_length is None else expert_length
        self._rows: deque[Tensor] = deque(maxlen=self._expert_length)
        self._used: dict[str, deque[Tensor]] = {}
        self._thresholds_L: dict[str, Tensor] = {}
        self._length = length

    def see(self, stats: Stats) -> dict[str, Tensor]:
        """Take in one logged step; the ratios ``(L,)`` of the window by metric name, NaN where there is none.

        What needs a full window is absent until there is one: a feature that three steps did not use is not dead.
        """
        ratios: dict[str, Tensor] = {}
        if "router/rows_LE" in stats and self._expert_length:
            self._rows.append(stats["router/rows_LE"] > 0)
            if len(self._rows) == self._expert_length:
                ratios["router/dead_experts_window"] = (~_any(self._rows)).sum(-1).double()
        for key in [key for key in stats if key.endswith("/used_LED")]:
            ratios |= self._see_site(stats, key.removesuffix("/used_LED"))
        return ratios

    def _see_site(self, stats: Stats, site: str) -> dict[str, Tensor]:
        ratios: dict[str, Tensor] = {}
        used = self._used.setdefault(site, deque(maxlen=self._length))
        used.append(stats[f"{site}/used_LED"])
        if len(used) == self._length:
            ratios[f"{site}/dead_features"] = (~_any(used)).double().mean((-1, -2))
        threshold_L = stats[f"{site}/smallest_LE"].sum(-1) / stats[f"{site}/rows_LE"].sum(-1)
        before_L = self._thresholds_L.get(site)
        self._thresholds_L[site] = threshold_L
        if before_L is not None:
            ratios[f"{site}/threshold_drift"] = threshold_L / before_L - 1.0
        return ratios


def _any(flags: deque[Tensor]) -> Tensor:
    return torch.stack(tuple(flags)).any(0)
