"""Where the time of a step goes: waiting for data, forward, backward, update."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class PhaseClock:
    """Seconds of the parts of one step on this rank.

    Work on a GPU is done when it is done, not when it is asked for: in a step that is reported the clock waits for it
    around every part, in the others it neither waits nor measures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measures = False
        self.seconds: dict[str, float] = {}
        """By part, of the step at work; empty where it is not reported."""

    def begin(self, *, measures: bool) -> None:
        """Forget the step before; ``measures`` says whether this one is reported."""
        self._measures = measures
        self.seconds = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to the part ``name``."""
        if not self._measures:
            yield
            return
        before = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - before

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
