"""Where the time of a step goes: waiting for data, forward, backward, update, and within them the collectives."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator

import torch
from torch.profiler import record_function

from qsparse_moe.training.distributed.collectives import PatchTarget, timed_collectives


class PhaseClock:
    """Seconds of the parts of one step on this rank.

    Work on a GPU is done when it is done, not when it is asked for: in a step that is reported the clock waits for it
    around every part, in the others it neither waits nor measures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measures = False
        self._traces = False
        self.seconds: dict[str, float] = {}
        """By part, of the step at work; empty where it is not reported."""

    def begin(self, *, measures: bool, traces: bool = False) -> None:
        """Forget the step before; ``measures`` says whether this one is reported, ``traces`` whether it is profiled.

        In a profile the parts stand by their names.
        """
        self._measures = measures
        self._traces = traces
        self.seconds = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside to the part ``name``."""
        with record_function(name) if self._traces else contextlib.nullcontext():
            yield from self._measured(name)

    def _measured(self, name: str) -> Iterator[None]:
        if not self._measures:
            yield
            return
        before = self._now()
        yield
        self._add(name, self._now() - before)

    @contextlib.contextmanager
    def collectives(self, kept_elsewhere: Iterable[PatchTarget] = ()) -> Iterator[None]:
        """Add the time of the collectives inside to ``communication``, which lies within the other parts.

        ``kept_elsewhere`` as in ``timed_collectives``. On CUDA nothing is measured.
        """
        if not self._measures or self._device.type == "cuda":
            yield
            return
        self.seconds["communication"] = 0.0
        with timed_collectives(functools.partial(self._add, "communication"), kept_elsewhere):
            yield

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
