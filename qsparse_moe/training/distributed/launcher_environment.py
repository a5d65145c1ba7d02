"""The environment variables by which a launcher assigns ranks. Imports no torch."""

from __future__ import annotations

import os
from typing import NamedTuple

from qsparse_moe.config.problems import show
from qsparse_moe.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = f"a launcher sets {', '.join(_NAMES)} together. Start ranks with the deepspeed launcher, or unset them all"


class LauncherRanks(NamedTuple):
    """This process among the ranks that its launcher started."""

    rank: int
    world_size: int
    local_rank: int
    """Index of this process among the ranks of its machine."""


def launcher_ranks() -> LauncherRanks:
    """Return the ranks from the launcher's environment variables; a single rank without a launcher.

    Raises:
        ConfigError: a variable is missing, is not a whole number, or is out of range.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return LauncherRanks(0, 1, 0)
    missing = [name for name in _NAMES if not os.environ.get(name)]
    world_size = launcher_world_size()
    # A single rank needs no rendezvous: some environments set WORLD_SIZE=1 and nothing else.
    if missing and world_size != 1:
        raise ConfigError(
            f"environment variables {', '.join(missing)} are not set but RANK or WORLD_SIZE is; {_WAY_OUT}"
        )
    if world_size > 1:
        master_port()
    return LauncherRanks(
        _whole_number("RANK", 0, 0, world_size - 1), world_size, _whole_number("LOCAL_RANK", 0, 0, world_size - 1)
    )


def launcher_world_size() -> int:
    """Return the number of ranks that the launcher started, 1 without a launcher.

    Raises:
        ConfigError: it is not a whole number.
    """
    return _whole_number("WORLD_SIZE", 1, 1, None)


def master_port() -> int:
    """Return the port of the rendezvous store.

    Raises:
        ConfigError: it is not a port number.
    """
    return _whole_number("MASTER_PORT", 29500, 1, 65535)


def num_local_ranks() -> int:
    """Return the number of ranks on this machine; 1 if the launcher does not set it.

    Raises:
        ConfigError: it is not a whole number.
    """
    # deepspeed sets LOCAL_SIZE, torchrun sets LOCAL_WORLD_SIZE.
    name = "LOCAL_SIZE" if os.environ.get("LOCAL_SIZE") else "LOCAL_WORLD_SIZE"
    return _whole_number(name, 1, 1, None)


def _whole_number(name: str, default: int, low: int, high: int | None) -> int:
    text = os.environ.get(name) or str(default)
    # int() alone would accept " 1", "1_0", and non-ASCII digits.
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if value < low or (high is not None and value > high):
        size = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"environment variable {name} ({show(text)}) must be a whole number {size}; {_WAY_OUT}")
    return value
