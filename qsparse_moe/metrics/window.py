"""Metrics of several logged steps: experts without a token, unused features, and the drift of thresholds.

The window spans the last logged steps of the run; its state is part of the checkpoints, so that a resumed run continues
it. L layers, E experts, D features.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsparse_moe.sparsity.stats import Stats

LENGTH = 10
"""Number of logged steps: a hundred steps with the default interval of 10."""


class Window:
    """The last ``length`` logged steps; for dead experts the last ``expert_length``, or none at all if that is 0."""

    def __init__(self, length: int = LENGTH, expert_length: int | None = None) -> None:
        self._length = length
        self._experts = _Idle(length if expert_length is None else expert_length)
        self._features: dict[str, _Idle] = {}
        self._thresholds_L: dict[str, Tensor] = {}

    def update(self, stats: Stats) -> dict[str, Tensor]:
        """Add one logged step and return the ratios ``(L,)`` of the window by metric name, NaN if a layer has none.

        Counts of dead experts and features are absent until the window is full: a feature that was unused in three
        steps is not dead.
        """
        ratios: dict[str, Tensor] = {}
        if "router/routed_LE" in stats and self._experts.length:
            dead_LE = self._experts.update(stats["router/routed_LE"] > 0)
            if dead_LE is not None:
                ratios["router/dead_experts_window"] = dead_LE.sum(-1).double()
        for key in [key for key in stats if key.endswith("/used_LED")]:
            ratios |= self._update_site(stats, key.removesuffix("/used_LED"))
        return ratios

    def _update_site(self, stats: Stats, site: str) -> dict[str, Tensor]:
        ratios: dict[str, Tensor] = {}
        # Consecutive unused steps, not the flags of every step: one number per feature, whatever the length.
        dead_LED = self._features.setdefault(site, _Idle(self._length)).update(stats[f"{site}/used_LED"])
        if dead_LED is not None:
            ratios[f"{site}/dead_features"] = dead_LED.double().mean((-1, -2))
        # Rows without a selected feature count as 0, as in the metric ``threshold``.
        threshold_L = stats[f"{site}/smallest_LE"].sum(-1) / stats[f"{site}/rows_LE"].sum(-1)
        before_L = self._thresholds_L.get(site)
        self._thresholds_L[site] = threshold_L
        # The first logged step has nothing to compare with: absent, not 0, which would mean a constant threshold.
        if before_L is not None:
            ratios[f"{site}/threshold_drift"] = threshold_L / before_L - 1.0
        return ratios

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; JSON-able, without NaN."""
        return {
            "experts": self._experts.state_dict(),
            "features": {site: idle.state_dict() for site, idle in self._features.items()},
            "thresholds": {
                site: [None if math.isnan(value) else value for value in threshold_L.tolist()]
                for site, threshold_L in self._thresholds_L.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; the lengths stay those of this window."""
        self._experts.load_state_dict(state["experts"])
        for site, idle in state["features"].items():
            self._features.setdefault(site, _Idle(self._length)).load_state_dict(idle)
        self._thresholds_L = {
            site: torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
            for site, values in state["thresholds"].items()
        }


class _Idle:
    """Counts for each of several things the consecutive logged steps in which it was not used."""

    def __init__(self, length: int) -> None:
        self.length = length
        """Number of unused steps after which a thing counts as dead; 0: never."""
        self._num_steps = 0
        self._steps: Tensor | None = None

    def update(self, used: Tensor) -> Tensor | None:
        """Add the flags of one step; return which things are dead, or None before ``length`` steps were added."""
        before = torch.zeros(used.shape, dtype=torch.int32) if self._steps is None else self._steps
        self._steps = torch.where(used, 0, before + 1)
        self._num_steps += 1
        # Before `length` steps, "unused so far" would count as dead.
        return self._steps >= self.length if self._num_steps >= self.length else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; JSON-able."""
        return {"num_seen": self._num_steps, "steps": None if self._steps is None else _packed(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._num_steps = state["num_seen"]
        self._steps = None if state["steps"] is None else _unpacked(state["steps"])


def _packed(numbers: Tensor) -> dict[str, Any]:
    """Return whole numbers as compressed text."""
    # One number per feature of every expert, nearly all of them 0: compressed, they stay small beside the weights.
    # Little-endian and 32 bits whatever the machine, because a checkpoint may be read on another one. Level 1 is the
    # fastest, and zeros compress well at any level.
    content = zlib.compress(numbers.numpy().astype("<i4").tobytes(), level=1)
    return {"shape": list(numbers.shape), "zlib_int32": base64.b64encode(content).decode("ascii")}


def _unpacked(packed: dict[str, Any]) -> Tensor:
    content = zlib.decompress(base64.b64decode(packed["zlib_int32"]))
    numbers = np.frombuffer(content, dtype="<i4").astype(np.int32)
    return torch.from_numpy(numbers).view(packed["shape"])
