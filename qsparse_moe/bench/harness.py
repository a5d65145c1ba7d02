"""Time contenders in turns, so that drifts in the speed of the machine affect all of them alike."""

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

from qsparse_moe.config.schema import ModelConfig


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one entry per round, each the median of the calls timed in that round."""

    seconds_by_round: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
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

    Every turn starts with ``settle`` untimed calls, so that the state in which one contender leaves shared caches (of
    the processor, and of oneDNN's compiled kernels) is not charged to the next. The first round is not timed. ``clock``
    None means the wall clock; ``time.process_time`` excludes the time of other programs on the machine.
    """
    clock = clock or time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            # Contenders alternate within a round, so that a slow phase of the machine hits all of them.
            median = _turn(call, calls, settle, synchronize, clock)
            if number:  # round 0 compiles kernels and fills caches
                seconds[name].append(median)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _turn(
    call: Callable[[], object], calls: int, settle: int, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    for _ in range(settle):
        call()
    taken = []
    for _ in range(calls):
        # Before the clock starts, so that work which an earlier call has queued is not charged to this one.
        synchronize()
        start = clock()
        call()
        synchronize()
        taken.append(clock() - start)
    return statistics.median(taken)


def ratio(slower: Timing, faster: Timing) -> dict[str, float]:
    """Return the speed-up of ``faster`` over ``slower``, per round: its median, minimum, and maximum."""
    # Ratios within a round, whose noise is common to both contenders.
    ratios = [a / b for a, b in zip(slower.seconds_by_round, faster.seconds_by_round, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until ``device`` has completed all queued work."""
    # A CUDA call returns before its kernels have run, so without waiting only the launch would be timed.
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def model_sizes(model: ModelConfig) -> dict[str, Any]:
    """Return the sizes of a model that a result records."""
    return {
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "heads": model.num_heads,
        "experts": model.moe.num_experts,
        "experts_per_token": model.moe.experts_per_token,
        "expert_hidden_size": model.moe.expert_hidden_size,
        "activation": model.moe.activation,
    }


def fingerprint() -> dict[str, Any]:
    """Return the machine and the software versions, which every result records."""
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
    # The cores of this process, which a container or taskset may restrict; macOS does not report them.
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
    # The mark of --dirty shows that a result does not belong to the commit alone.
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    )
    # None outside of a checkout, for example in an installed package.
    return result.stdout.strip() or None
