"""``qsparse-moe layout``: say what a run takes on a machine in every layout that training accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qsparse_moe.accounting.devices import KNOWN, find_device
from qsparse_moe.accounting.layout_plan import DISK, Machine, Plan, find_layouts, gigabytes, make_plan
from qsparse_moe.cli.console import print_json, result_console
from qsparse_moe.cli.describe import with_vocabulary_size
from qsparse_moe.config.load import load_config
from qsparse_moe.config.rules import accepts_layout
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError

GPUS_PER_NODE = 8


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("layout")(layout)


def layout(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings such as data.sequence_length=8192.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of devices, which is the number of ranks.", min=1)] = 1,
    gpu: Annotated[
        str,
        typer.Option(
            help=f"Device: {', '.join(KNOWN)}; or KEY=NUMBER,... or a YAML file with memory, bf16, bandwidth and link."
        ),
    ] = "h100-80gb",
    nodes: Annotated[
        int | None, typer.Option(help="Number of nodes; by default 8 devices per node.", min=1, show_default=False)
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Bytes per second that a device sends to other nodes; by default that of --gpu.", min=1),
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option(help="Bytes of host memory per node; by default that of --gpu.", min=1)
    ] = None,
    disk: Annotated[float, typer.Option(help="Bytes per second that a node writes to the disk.", min=1)] = DISK,
    best: Annotated[int, typer.Option(help="Number of layouts to show.", min=1)] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count memory, bytes sent, checkpoints, and step time of a run in every layout, without building it.

    The layouts are those that train accepts: ZeRO stages, offload, expert parallelism, micro-batches, recomputation.
    Memory and bytes follow from the engines; times from a simple model of the device, and nothing is measured.
    """
    config = with_vocabulary_size(load_config(path, overrides or ()))
    machine = describe_machine(gpus=gpus, gpu=gpu, nodes=nodes, bandwidth=bandwidth, host_memory=host_memory, disk=disk)
    plans = find_layouts(config, machine)
    asked = make_plan(config, machine) if accepts_layout(config, machine.ranks) else None
    if json:
        print_json(_report(config, machine, asked, plans, best))
    else:
        _print_tables(machine, asked, plans, best)


def describe_machine(
    *,
    gpus: int,
    gpu: str,
    nodes: int | None = None,
    bandwidth: float | None = None,
    host_memory: float | None = None,
    disk: float = DISK,
) -> Machine:
    """Return the machine that the options describe.

    Raises:
        ConfigError: the device is not known, or the nodes do not divide the devices.
    """
    device = find_device(gpu, network=bandwidth)
    if nodes is None:
        # Whole nodes where the number allows it, else one node that holds all of them.
        nodes = gpus // GPUS_PER_NODE if gpus % GPUS_PER_NODE == 0 else 1
    if gpus % nodes:
        raise ConfigError(
            f"--nodes ({nodes}) must divide --gpus ({gpus}), because every node has the same number of devices; "
            f"choose --nodes {max(size for size in range(1, nodes) if gpus % size == 0)}"
        )
    return Machine(device, gpus, nodes, host_memory, disk)


def _report(config: RunConfig, machine: Machine, asked: Plan | None, plans: list[Plan], best: int) -> dict[str, Any]:
    device = machine.device
    return {
        "name": config.training.name,
        "machine": {
            "device": vars(device),
            "ranks": machine.ranks,
            "nodes": machine.nodes,
            "host_bytes_per_rank": machine.host_per_rank,
            "disk_bytes_per_second": machine.disk,
        },
        "num_layouts": len(plans),
        "num_fitting": sum(plan.fits for plan in plans),
        "config": None if asked is None else asked.describe(),
        "best": [plan.describe() for plan in plans[:best]],
    }


def _print_tables(machine: Machine, asked: Plan | None, plans: list[Plan], best: int) -> None:
    console = result_console()
    device, fitting = machine.device, sum(plan.fits for plan in plans)
    console.print(
        f"{machine.ranks} x {device.name} in {machine.nodes} nodes: {gigabytes(device.memory)} per device, of which "
        f"{gigabytes(device.reserve)} are reserved, and {gigabytes(machine.host_per_rank)} of host memory per device",
        soft_wrap=True,
    )
    if asked is None:
        console.print("the config itself is no layout of this machine: train would refuse it")
    else:
        console.print(_parts_table(asked))
        console.print(f"the config as it is: {asked.verdict}", soft_wrap=True)
    shown = plans[: best if fitting else 1]
    title = (
        f"The best of {fitting} layouts that fit, of {len(plans)} possible"
        if fitting
        else f"None of {len(plans)} layouts fits; the nearest"
    )
    console.print(_table(title, shown))
    for number, plan in enumerate(shown, start=1):
        console.print(f"{number}: {' '.join(plan.overrides) or 'the config as it is'}", soft_wrap=True)
    if not fitting:
        console.print(shown[0].verdict, soft_wrap=True)
    console.print("Memory and bytes are counted; times are those of a simple model of the device (docs/layout.md).")


COLUMNS = (
    "ZeRO", "offload", "expert parallel", "micro-batch", "recompute", "GB of device", "GB of host", "GB sent in node",
    "between nodes", "s per step", "MFU", "limit",
)  # fmt: skip
"""Columns of the table of layouts."""


def _table(title: str, plans: list[Plan]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for number, plan in enumerate(plans, start=1):
        table.add_row(str(number), *row(plan))
    return table


def _parts_table(plan: Plan) -> Table:
    """Return the table of a rank's memory by part."""
    memory = plan.memory
    table = Table(title=f"Bytes of one rank at its peak in a step ({memory.moment})", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for part, size in memory.parts().items():
        table.add_row(part, f"{size / 1e9:,.2f}")
    table.add_row("reserve of the device", f"{plan.machine.device.reserve / 1e9:,.2f}")
    table.add_section()
    table.add_row("device, while it is built", f"{memory.build / 1e9:,.2f}")
    table.add_row("host, offloaded state", f"{memory.host_state / 1e9:,.2f}")
    table.add_row("host, snapshot of a checkpoint", f"{memory.host_snapshot / 1e9:,.2f}")
    return table


def row(plan: Plan) -> tuple[str, ...]:
    """Return the cells of one layout, in the order of ``COLUMNS``."""
    training, time = plan.config.training, plan.time
    within, between = (sum(getattr(one, part) for one in plan.sent) for part in ("within", "between"))
    return (
        "none" if training.engine == "torch" else str(training.deepspeed.zero_stage),
        _offload(plan.config),
        str(training.expert_parallel_size),
        str(training.micro_batch_size),
        training.activation_checkpointing,
        f"{plan.device_need / 1e9:,.1f}",
        f"{plan.host_need / 1e9:,.1f}",
        f"{within / 1e9:,.1f}",
        f"{between / 1e9:,.1f}",
        f"{time.total:.3g}",
        f"{100 * time.utilisation:.0f} %",
        time.limit,
    )


def _offload(config: RunConfig) -> str:
    chosen = config.training.deepspeed
    places = {"optimizer": chosen.offload_optimizer, "parameters": chosen.offload_parameters}
    moved = [f"{name} {place}" for name, place in places.items() if place != "none"]
    return ", ".join(moved) if moved and config.training.engine == "deepspeed" else "none"
