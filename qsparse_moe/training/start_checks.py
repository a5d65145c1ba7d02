"""Checks of a run that need its ranks and its machine, before a model is built and a file is written."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qsparse_moe.accounting.devices import KNOWN, Device
from qsparse_moe.accounting.layout_plan import Machine, Plan, gigabytes, make_plan, nearest_layout
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.training.distributed.launcher_environment import num_local_ranks
from qsparse_moe.training.distributed.ranks import Distributed

_MEMORY = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def check_same_config(config: RunConfig, distributed: Distributed) -> None:
    """Raise on every rank unless all ranks have the same config.

    Raises:
        ConfigError: they differ; the message names the first settings that do, and the ranks.
    """
    digests = distributed.all_gather(zlib.crc32(config_to_yaml(config).encode()))
    if len(set(digests)) == 1:
        return
    # The settings themselves are exchanged only now.
    settings = distributed.all_gather(_flat(config.model_dump(mode="json")))
    names = sorted({name for found in settings for name in found})
    differing = [name for name in names if len({show(found.get(name)) for found in settings}) > 1]
    raise ConfigError(f"{'; '.join(_values(name, settings) for name in differing[:3])}{_more(differing)}")


def _more(differing: list[str]) -> str:
    others = f" ({len(differing)} settings differ)" if len(differing) > 3 else ""
    return (
        f"{others}; all ranks must have the same config. Start every node with the same file and the same settings on "
        "the command line"
    )


def _values(name: str, settings: list[dict[str, Any]]) -> str:
    by_value: dict[str, list[str]] = {}
    for rank, found in enumerate(settings):
        by_value.setdefault(show(found.get(name)), []).append(str(rank))
    parts = (
        f"{value} on {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(ranks[:4])}{', ...' if len(ranks) > 4 else ''}"
        for value, ranks in by_value.items()
    )
    return f"{name} is {' and '.join(parts)}"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the settings by dotted path; a list is one value."""
    if not isinstance(value, dict):
        return {path: value}
    return {
        name: below
        for key, part in value.items()
        for name, below in _flat(part, f"{path}.{key}" if path else str(key)).items()
    }


def check_memory(config: RunConfig, distributed: Distributed) -> None:
    """Raise unless every rank's share of the run fits into its device and its part of the host memory.

    Raises:
        ConfigError: it does not; the message names the largest part and the nearest layout that fits.
    """
    if not config.training.check_memory:
        return
    nodes = max(1, distributed.world_size // num_local_ranks())
    found = this_machine(distributed.device, distributed.world_size, nodes)
    # A machine that tells nothing is not judged.
    if found is None:
        return
    plan = make_plan(config, found)
    if not plan.fits:
        raise ConfigError(_too_large(plan, nearest_layout(config, found)))


def _too_large(plan: Plan, nearest: Plan | None) -> str:
    machine = plan.machine
    settings = ", ".join(f"{name.rpartition('.')[2]} {size / 1e9:.1f}" for name, size in plan.memory.parts().items())
    way_out = (
        "no layout of this run fits; use more ranks, a smaller model or shorter sequences"
        if nearest is None
        else f"the nearest layout that fits is {' '.join(nearest.overrides)}"
    )
    return (
        f"training on {machine.ranks} {'rank' if machine.ranks == 1 else 'ranks'} needs "
        f"{gigabytes(plan.device_need)} of {gigabytes(machine.device.memory)} on each device ({machine.device.name}) "
        f"and {gigabytes(plan.host_need)} of {gigabytes(machine.host_per_rank)} of host memory per rank: it "
        f"{plan.verdict} (GB by part: {settings}); {way_out}. qsparse-moe layout lists all layouts, and "
        "training.check_memory=false starts all the same"
    )


def this_machine(device: torch.device, ranks: int, nodes: int) -> Machine | None:
    """Return the machine of this rank: its device's memory, and its part of the host's; None if neither is known."""
    host = host_memory()
    per_node = ranks // nodes
    if device.type != "cuda":
        if host is None:
            return None
        # Ranks on a CPU share the memory of the host.
        return Machine(replace(KNOWN["cpu"], memory=host / per_node), ranks, nodes, host)
    properties = torch.cuda.get_device_properties(device)
    return Machine(_cuda_device(properties.name, float(properties.total_memory)), ranks, nodes, host)


def _cuda_device(name: str, memory: float) -> Device:
    # Only the times by which layouts that fit are compared depend on the other figures.
    return replace(KNOWN["h100-80gb"], name=name, memory=memory, source="this machine")


def host_memory() -> float | None:
    """Return the bytes of host memory that this process may use at most; None if the system does not say."""
    if not _MEMORY.is_file():
        return None
    total = float(_MEMORY.read_text().split("MemTotal:")[1].split()[0]) * 1024
    limit = _CONTAINER.read_text().strip() if _CONTAINER.is_file() else "max"
    # The limit of a container may be lower than the machine's memory.
    return min(total, float(limit)) if limit.isdecimal() else total
