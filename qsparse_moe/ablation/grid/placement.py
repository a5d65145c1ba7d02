"""Placement of the runs of a grid: how many at a time, on which devices, with which launcher. Imports no torch."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from qsparse_moe.config.problems import show
from qsparse_moe.errors import ConfigError

Launcher = Literal["auto", "deepspeed", "none"]

# As the default of an argument, a plain dict could be changed by a caller.
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Placement:
    """The way in which the runs of a grid share a machine.

    Raises:
        ConfigError: the concurrent runs need more devices than there are, or several ranks have no launcher.
    """

    ranks: int = 1
    """Processes per run."""
    jobs: int = 1
    """Number of concurrent runs; without devices they share the cores."""
    devices: tuple[str, ...] = ()
    """Indices of CUDA devices, ``ranks`` per concurrent run; if empty, every run sees all devices."""
    launcher: Launcher = "auto"
    """``auto`` uses the DeepSpeed launcher if a run has several ranks."""

    def __post_init__(self) -> None:
        wrong = [device for device in self.devices if not device.isdecimal()]
        if wrong or len(set(self.devices)) < len(self.devices):
            raise ConfigError(
                f"--devices ({show(','.join(self.devices))}) must be different indices of CUDA devices, such as 0,1"
            )
        needed = self.ranks * self.jobs
        if self.devices and needed > len(self.devices):
            raise ConfigError(
                f"--devices ({','.join(self.devices)}) must name {needed} devices for {self.jobs} runs at a time "
                f"(--jobs) of {self.ranks} processes each (--ranks); name more devices, or set "
                f"--jobs {max(1, len(self.devices) // self.ranks)}"
            )
        if self.launcher == "none" and self.ranks > 1:
            raise ConfigError(
                f"--launcher none starts one process per run, but --ranks is {self.ranks}; leave --launcher out"
            )

    def slots(self) -> list[tuple[str, ...]]:
        """Return the devices of each concurrent run."""
        return [self.devices[job * self.ranks : (job + 1) * self.ranks] for job in range(self.jobs)]

    def environment(
        self, slot: Sequence[str], num_cores: int, *, given: Mapping[str, str] = _NOTHING
    ) -> dict[str, str]:
        """Return the environment of a run in ``slot``: ``given`` with the additions of the placement.

        Concurrent runs divide the cores among them unless the user has set OMP_NUM_THREADS, which is not changed.
        """
        # Without a limit, each process would start one thread per core of the machine.
        threads = {"OMP_NUM_THREADS": str(max(1, num_cores // (self.ranks * self.jobs)))}
        return {**threads, **given} | ({"CUDA_VISIBLE_DEVICES": ",".join(slot)} if slot else {})

    def command(self, config: Path, slot: Sequence[str]) -> list[str]:
        """Return the command that trains ``config``."""
        train = ["qsparse_moe", "train", str(config)]
        # A single process needs no launcher, which would only add seconds of start-up.
        if self.launcher == "none" or (self.launcher == "auto" and self.ranks == 1):
            return [sys.executable, "-m", *train]
        # With --num_gpus, the launcher ignores CUDA_VISIBLE_DEVICES, so named devices need --include.
        where = ["--include", f"localhost:{','.join(slot)}"] if slot else ["--num_gpus", str(self.ranks)]
        launcher = ["qsparse_moe.training.launcher", *where, "--master_port", str(_free_port())]
        return [sys.executable, "-m", *launcher, "--module", *train]


def _free_port() -> int:
    # Concurrent launchers must not share the default port. Port 0 lets the system choose a free one.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
