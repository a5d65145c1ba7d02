"""Where the runs of a grid are put: how many at a time, on which devices, through which launcher. Imports no torch."""

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

_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Placement:
    """How the runs of a grid share a machine.

    Raises:
        ConfigError: there are fewer devices than the runs at the same time need, or several ranks and no launcher.
    """

    ranks: int = 1
    """Processes a run."""
    jobs: int = 1
    """Runs at the same time; without devices they share the cores."""
    devices: tuple[str, ...] = ()
    """Indices of CUDA devices, ``ranks`` of them for every run; empty: each run sees what there is."""
    launcher: Launcher = "auto"
    """auto: deepspeed's where a run has several ranks."""

    def __post_init__(self) -> None:
        wrong = [device for device in self.devices if not device.isdecimal()]
        if wrong or len(set(self.devices)) < len(self.devices):
            raise ConfigError(
                f"--devices ({show(','.join(self.devices))}) must be different indices of CUDA devices, such as 0,1"
            )
        needed = self.ranks * self.jobs
        if self.devices and needed > len(self.devices):
            raise ConfigError(
                f"--devices names {len(self.devices)}, and {self.jobs} runs at a time (--jobs) of {self.ranks} "
                f"processes (--ranks) need {needed}; name more devices, or set "
                f"--jobs {max(1, len(self.devices) // self.ranks)}"
            )
        if self.launcher == "none" and self.ranks > 1:
            raise ConfigError(
                f"--launcher none starts one process a run, and --ranks is {self.ranks}; leave --launcher out"
            )

    def slots(self) -> list[tuple[str, ...]]:
        """The devices of each of the runs at the same time."""
        return [self.devices[job * self.ranks : (job + 1) * self.ranks] for job in range(self.jobs)]

    def environment(
        self, slot: Sequence[str], num_cores: int, *, given: Mapping[str, str] = _NOTHING
    ) -> dict[str, str]:
        """Return the whole environment of a run in ``slot``: ``given``, and what the placement adds to it.

        The runs share the cores of the machine, unless the user has set OMP_NUM_THREADS: that is kept.
        """
        threads = {"OMP_NUM_THREADS": str(max(1, num_cores // (self.ranks * self.jobs)))}
        return {**threads, **given} | ({"CUDA_VISIBLE_DEVICES": ",".join(slot)} if slot else {})

    def command(self, config: Path, slot: Sequence[str]) -> list[str]:
        """The command that trains ``config``."""
        train = ["qsparse_moe", "train", str(config)]
        if self.launcher == "none" or (self.launcher == "auto" and self.ranks == 1):
            return [sys.executable, "-m", *train]
        # Where it is given a number of devices, the launcher ignores CUDA_VISIBLE_DEVICES.
        where = ["--include", f"localhost:{','.join(slot)}"] if slot else ["--num_gpus", str(self.ranks)]
        launcher = ["qsparse_moe.training.launcher", *where, "--master_port", str(_free_port())]
        return [sys.executable, "-m", *launcher, "--module", *train]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
