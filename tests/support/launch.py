"""Starts ``ranks.py`` with the deepspeed launcher, or without it for one rank, and collects what the ranks wrote."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsparse_moe.config.schema import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = Path(__file__).with_name("ranks.py")


def entry(
    label: str,
    config: RunConfig,
    *,
    copy_of: Path | None = None,
    stop_after: int | None = None,
    fault: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One run of a plan.

    Args:
        label: names its outcome.
        config: of the run.
        copy_of: a run folder that is copied to the run's own before it starts.
        stop_after: the step that SIGTERM lets be the last.
        fault: see ``ranks.broken``.
    """
    settings = config.model_dump(mode="json")
    copied = None if copy_of is None else str(copy_of)
    return {"label": label, "config": settings, "copy_of": copied, "stop_after": stop_after, "fault": fault}


def calibration(label: str, run_dir: Path, *, num_sequences: int, max_values: int) -> dict[str, Any]:
    """A calibration of a run that precedes it in the plan, or is in an earlier plan; see ``calibrate_run``."""
    return {
        "label": label,
        "calibrate": {"run_dir": str(run_dir), "num_sequences": num_sequences, "max_values": max_values},
    }


def run_plan(
    folder: Path, plan: Sequence[dict[str, Any]], *, ranks: int, nodes: int = 1, timeout: float = 900
) -> dict[str, list[Any]]:
    """Return the outcomes by label: a list over the ranks. With several ``nodes`` each has its own launcher."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.json"
    file.write_text(json.dumps(list(plan)))
    log = folder / "log.txt"
    with log.open("w") as output:
        processes = start_nodes([str(RANKS), str(file)], [ranks // nodes] * nodes, output=output)
        try:
            codes = [process.wait(timeout) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{ranks} ranks did not end within {timeout} s:\n{log.read_text()[-4000:]}") from None
        finally:
            end(processes)
    assert not any(codes), f"{ranks} ranks ended with {codes}:\n{log.read_text()[-4000:]}"
    return {
        item["label"]: [json.loads((folder / f"{item['label']}.rank{rank}.json").read_text()) for rank in range(ranks)]
        for item in plan
    }


def start(
    arguments: Sequence[str],
    *,
    ranks: int,
    output: Any,
    launcher: str = "deepspeed.launcher.runner",
    prefix: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start a script on ``ranks`` ranks, in a process group of its own; ``prefix`` is a command that starts others."""
    if ranks == 1:
        command = [sys.executable, *arguments]
    else:
        where = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
        command = [*prefix, sys.executable, "-m", launcher, *where, *arguments]
    return _start(command, output)


def start_nodes(
    arguments: Sequence[str], ranks_by_node: Sequence[int], *, output: Any
) -> list[subprocess.Popen[bytes]]:
    """Start a script as on several machines, all on this one: what ``launch/slurm.sbatch`` starts on every node."""
    if len(ranks_by_node) == 1:
        return [start(arguments, ranks=ranks_by_node[0], output=output)]
    slots = {f"node-{node}": list(range(ranks)) for node, ranks in enumerate(ranks_by_node)}
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    port = free_port()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={port}"]
    return [_start([*launcher, f"--node_rank={node}", *arguments], output) for node in range(len(slots))]


def _start(command: Sequence[str], output: Any) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    # As the launcher finds it on a machine without CUDA: a rank is a slot.
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what has not ended, with all that it started."""
    for process in processes:
        if process.poll() is None:
            kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """Return a port on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
