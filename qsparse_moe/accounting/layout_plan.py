"""Figures and verdict of a layout on a machine, and the search over all layouts that ``train`` accepts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qsparse_moe.accounting.devices import Device
from qsparse_moe.accounting.layout_memory import RankMemory, checkpoint_bytes, rank_memory
from qsparse_moe.accounting.layout_traffic import Sent, checkpoint_seconds, sent_bytes
from qsparse_moe.accounting.step_time import StepTime, step_time
from qsparse_moe.config.rules import accepts_layout, check_world_size
from qsparse_moe.config.schema import RECOMPUTE, RunConfig

PROCESS_BYTES = 1.5e9
"""Host memory of a rank's process with its libraries, beside what is counted; an estimate."""
DISK = 2e9
"""Bytes per second that a node writes to the disk or the shared file system; an assumption."""
SETTINGS = (
    "training.engine",
    "training.deepspeed.zero_stage",
    "training.deepspeed.offload_optimizer",
    "training.deepspeed.offload_parameters",
    "training.expert_parallel_size",
    "training.micro_batch_size",
    "training.activation_checkpointing",
)
"""The settings that a layout consists of."""


@dataclass(frozen=True)
class Machine:
    """Devices in nodes; every rank has one device."""

    device: Device
    ranks: int
    nodes: int = 1
    host_memory: float | None = None
    """Bytes of host memory per node; None: that of the device's kind of node."""
    disk: float = DISK

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks in one node."""
        return self.ranks // self.nodes

    @property
    def host_per_rank(self) -> float:
        """Bytes of host memory per rank."""
        return self.device.host_memory if self.host_memory is None else self.host_memory / self.ranks_per_node


@dataclass(frozen=True)
class Plan:
    """A layout with its figures on a machine."""

    config: RunConfig
    machine: Machine
    memory: RankMemory
    overrides: tuple[str, ...]
    """The settings that differ from those of the config that was asked about."""

    @property
    def device_need(self) -> float:
        """Bytes that a rank needs of its device, with the reserve; on a CPU, of the host's memory too."""
        need = self.memory.device + self.machine.device.reserve
        return need + self.memory.host if self.machine.device.is_host else need

    @property
    def host_need(self) -> float:
        """Bytes that a rank needs of the host's memory."""
        return 0.0 if self.machine.device.is_host else self.memory.host + PROCESS_BYTES

    @property
    def excess(self) -> float:
        """Bytes that the layout needs beyond the memory of the device or of the host; at most 0 if it fits."""
        return max(self.device_need - self.machine.device.memory, self.host_need - self.machine.host_per_rank)

    @property
    def fits(self) -> bool:
        """Whether the layout fits into the machine."""
        return self.excess <= 0

    @property
    def sent(self) -> tuple[Sent, ...]:
        """What a rank sends in a step."""
        return sent_bytes(self.config, self.machine.ranks, self.machine.nodes)

    @property
    def time(self) -> StepTime:
        """The time of a step by the model of the device."""
        return step_time(self.config, self.machine.ranks, self.machine.device, self.sent)

    @property
    def verdict(self) -> str:
        """Say whether it fits; if not, by how much and which part needs most."""
        if self.fits:
            return f"fits, {gigabytes(-self.excess)} left"
        if self.device_need - self.machine.device.memory < self.excess:
            return f"needs {gigabytes(self.excess)} more of host memory per rank"
        parts = self.memory.parts()
        largest = max(parts, key=lambda part: parts[part])
        return f"needs {gigabytes(self.excess)} more on the device; {largest} take {gigabytes(parts[largest])}"

    def describe(self) -> dict[str, Any]:
        """Return all figures, JSON-able."""
        memory, time = self.memory, self.time
        size = checkpoint_bytes(self.config)
        return {
            "layout": {name: setting(self.config, name) for name in SETTINGS},
            "overrides": list(self.overrides),
            "fits": self.fits,
            "verdict": self.verdict,
            "device_bytes": self.device_need,
            "device_parts": memory.parts(),
            "device_moments": {"build": memory.build, "step": memory.step, "save": memory.save},
            "step_moment": memory.moment,
            "host_bytes": self.host_need,
            "host_parts": {"state": memory.host_state, "snapshot": memory.host_snapshot},
            "nvme_bytes": memory.nvme,
            "sent": [vars(one) for one in self.sent],
            "sent_within_node": sum(one.within for one in self.sent),
            "sent_between_nodes": sum(one.between for one in self.sent),
            "checkpoint_bytes": size,
            "checkpoint_seconds": checkpoint_seconds(size, self.machine.nodes, self.machine.disk),
            "step_seconds": vars(time) | {"total": time.total},
            "limit": time.limit,
            "tokens_per_second": self.config.training.global_batch_size * self.config.data.sequence_length / time.total,
        }


def make_plan(config: RunConfig, machine: Machine, overrides: tuple[str, ...] = ()) -> Plan:
    """Return the figures of the layout that ``config`` itself has."""
    return Plan(config, machine, rank_memory(config, machine.ranks), overrides)


def find_layouts(config: RunConfig, machine: Machine) -> list[Plan]:
    """Return every layout that ``train`` accepts on ``machine``: those that fit by step time, then by what they lack.

    Raises:
        ConfigError: no layout is possible, because the ranks do not divide the global batch.
    """
    check_world_size(
        _changed(config, {"training.micro_batch_size": 1, "training.expert_parallel_size": 1}), machine.ranks
    )
    plans = [make_plan(layout, machine, changed_settings(config, layout)) for layout in layouts(config, machine)]
    fitting = [(plan.time.total, len(plan.overrides), plan) for plan in plans if plan.fits]
    return [plan for *_, plan in sorted(fitting, key=lambda item: item[:2])] + sorted(
        (plan for plan in plans if not plan.fits), key=lambda plan: plan.excess
    )


def nearest_layout(config: RunConfig, machine: Machine) -> Plan | None:
    """Return the layout that fits and changes the fewest settings, of these the fastest; None if none fits."""
    fitting = [plan for plan in find_layouts(config, machine) if plan.fits]
    return min(fitting, key=lambda plan: len(plan.overrides), default=None)


def layouts(config: RunConfig, machine: Machine) -> Iterator[RunConfig]:
    """Yield the configs of all layouts that ``train`` accepts on ``machine``.

    Hierarchical partitioning (ZeRO++) is none of them, because ``training.deepspeed`` does not offer it.
    """
    experts, ranks = config.model.moe.num_experts, machine.ranks
    sequences = config.training.global_batch_size // ranks
    for stage, optimizer, parameters in _states(config):
        for parallel in _divisors(ranks):
            if experts % parallel:
                continue
            for micro in _divisors(sequences):
                for recompute in RECOMPUTE:
                    changes = {
                        "training.engine": "deepspeed",
                        "training.deepspeed.zero_stage": stage,
                        "training.deepspeed.offload_optimizer": optimizer,
                        "training.deepspeed.offload_parameters": parameters,
                        "training.expert_parallel_size": parallel,
                        "training.micro_batch_size": micro,
                        "training.activation_checkpointing": recompute,
                    }
                    layout = _changed(config, changes)
                    if accepts_layout(layout, ranks):
                        yield layout


def _states(config: RunConfig) -> Iterator[tuple[int, str, str]]:
    """Yield ZeRO stages with the places of the optimizer's state and of the parameters."""
    # Without a folder for its files, offload to NVMe is not possible.
    places = ("none", "cpu", "nvme") if config.training.deepspeed.nvme_path else ("none", "cpu")
    for stage in range(4):
        for optimizer in places:
            for parameters in places:
                yield stage, optimizer, parameters


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    of_training = {path.split(".")[1]: value for path, value in changes.items() if path.count(".") == 1}
    of_deepspeed = {path.split(".")[2]: value for path, value in changes.items() if path.count(".") == 2}
    if of_deepspeed:
        if "nvme" not in of_deepspeed.values():
            of_deepspeed["nvme_path"] = None
        of_training["deepspeed"] = config.training.deepspeed.model_copy(update=of_deepspeed)
    return config.model_copy(update={"training": config.training.model_copy(update=of_training)})


def setting(config: RunConfig, path: str) -> Any:
    """Return the value of a setting of ``SETTINGS``."""
    found: Any = config
    for part in path.split("."):
        found = getattr(found, part)
    return found


def changed_settings(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """Return the settings of the layout that differ, as overrides."""
    changed = [f"{path}={setting(after, path)}" for path in SETTINGS if setting(before, path) != setting(after, path)]
    # A path without an offload to files breaks a rule.
    if before.training.deepspeed.nvme_path and not after.training.deepspeed.nvme_path:
        changed.append("training.deepspeed.nvme_path=null")
    return tuple(changed)


def gigabytes(num_bytes: float) -> str:
    """Return bytes as text, in decimal gigabytes."""
    return f"{num_bytes / 1e9:,.1f} GB"
