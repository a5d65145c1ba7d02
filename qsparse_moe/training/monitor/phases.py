"""The time of a step by phase: data, forward, backward, update, and the collectives within them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator

import torch
from torch.profiler import record_function

from qsparse_moe.training.distributed.collectives import PatchTarget, timed_collectives


class PhaseClock:
    """Measures the seconds of each phase of a step on this rank.

    Kernels on a GPU run asynchronously. In a reported step the clock therefore synchronizes around every phase; in
    other steps it neither synchronizes nor measures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measures = False
        self._traces = False
        self.seconds: dict[str, float] = {}
        """Seconds by phase in the current step; empty in a step that is not reported."""

    def begin(self, *, measures: bool, traces: bool = False) -> None:
        """Begin a step; ``measures`` is whether it is reported, and ``traces`` whether it is profiled.

        A profile shows the phases by their names.
        """
        self._measures = measures
        self._traces = traces
        self.seconds = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the block to the phase ``name``."""
        # record_function has a cost in every call, also when no profiler runs.
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
    def collectives(self, aliases: Iterable[PatchTarget] = ()) -> Iterator[None]:
        """Add the time of collectives inside the block to ``communication``, which is part of the other phases.

        ``aliases`` are passed to ``timed_collectives``. On CUDA nothing is measured.
        """
        if not self._measures or self._device.type == "cuda":
            yield
            return
        # Reported even without a collective, so that the metric has a value in every logged step.
        self.seconds["communication"] = 0.0
        with timed_collectives(functools.partial(self._add, "communication"), aliases):
            yield

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            # Kernels run asynchronously, so the clock must wait for them.
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
