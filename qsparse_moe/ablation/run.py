"""The runs of a grid, each in its own process; finished ones are kept, interrupted ones go on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qsparse_moe.ablation.grid import Grid, GridRun
from qsparse_moe.ablation.outcome import outcome_of
from qsparse_moe.ablation.results import Outcome
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.training.distributed import num_cores
from qsparse_moe.training.run_folder import is_finished

LOG_TAIL = 400


def run_grid(
    grid: Grid, *, ranks: int = 1, jobs: int = 1, tell: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Bring every run of ``grid`` to its end; a broken one is reported, and the others go on.

    Args:
        grid: its configs.
        ranks: processes a run, through the deepspeed launcher where there is more than one.
        jobs: runs at the same time; they share the cores.
        tell: called with every outcome as it comes.

    Returns:
        The outcomes in the order of the grid.
    """
    threads = max(1, num_cores() // (ranks * jobs))

    def bring_to_end(run: GridRun) -> Outcome:
        try:
            error = None if is_finished(run.config) else _start(grid, run, ranks, threads)
        except (ConfigError, CheckpointError) as refused:  # the folder is that of another run
            error = str(refused)
        outcome = outcome_of(grid, run, error)
        tell(outcome)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(bring_to_end, grid.runs))


def _start(grid: Grid, run: GridRun, ranks: int, threads: int) -> str | None:
    """Train ``run`` in processes of its own; the end of its log if it broke."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    file = grid.folder / f"{run.id}.yaml"
    file.write_text(config_to_yaml(run.config), "utf-8")
    log = grid.folder / f"{run.id}.log"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as output:
        done = subprocess.run(_command(file, ranks), stdout=output, stderr=output, env=environment, check=False)
    if done.returncode == 0 and is_finished(run.config):
        return None
    text = log.read_text("utf-8", errors="replace").strip()
    return f"exit code {done.returncode}, see {log}: ...{text[-LOG_TAIL:]}"


def _command(file: Path, ranks: int) -> list[str]:
    train = ["qsparse_moe", "train", str(file)]
    if ranks == 1:
        return [sys.executable, "-m", *train]
    launcher = ["deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(_free_port())]
    return [sys.executable, "-m", *launcher, "--module", *train]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
