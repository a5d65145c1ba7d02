"""Timings of contenders in turns, so that a machine whose speed drifts is fair to all of them."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, an entry a round, each the median of the calls that the round timed."""

    seconds_by_round: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, seconds."""
        return statistics.median(self.seconds_by_round)


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 3,
    settle: int = 1,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time every contender ``calls`` times in each of ``rounds`` rounds, one contender after the other.

    ``settle`` untimed calls begin every turn: what one contender leaves in shared caches (the processor's, and that of
    oneDNN's compiled kernels) is not charged to the next. One whole untimed round comes first. ``clock`` None reads the
    wall clock; ``time.process_time`` leaves out what other programs on the machine take.
    """
    clock = clock or time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            median = _turn(call, calls, settle, synchronize, clock)
            if number:
                seconds[name].append(median)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _turn(
    call: Callable[[], object], calls: int, settle: int, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    for _ in range(settle):
        call()
    taken = []
    for _ in range(calls):
        synchronize()
        start = clock()
        call()
        synchronize()
        taken.append(clock() - start)
    return statistics.median(taken)


def ratio(slower: Timing, faster: Timing) -> dict[str, float]:
    """How many times faster ``faster`` is than ``slower``: median, least and most over the rounds, round by round."""
    ratios = [a / b for a, b in zip(slower.seconds_by_round, faster.seconds_by_round, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def fingerprint() -> dict[str, Any]:
    """The machine and the software that a result was measured on."""
    return {
        "processor": _processor(),
        "cores": len(_cores()),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family', '?')})"


def _commit() -> str | None:
    folder = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
