"""The runs of a grid, each in its own process; finished ones are kept, interrupted ones go on."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.grid import Grid, GridRun
from qsparse_moe.accounting.parameters import count_parameters
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.names import layer_name
from qsparse_moe.training.run_folder import is_finished, run_folder

LOG_TAIL = 400


@dataclass(frozen=True)
class Outcome:
    """What one run came to; a line of ``results.jsonl``."""

    id: str
    variant: str
    seed: int
    finished: bool
    error: str | None
    """The end of what a broken run printed."""
    bits_per_byte: float | None
    """On validation rows, after the last step."""
    loss: float | None
    """The same in nats a token."""
    tokens: int
    active_parameters: int
    """That a token uses by routing."""
    kept_parameters: float
    """Those of them whose input Q-Sparse keeps."""
    tokens_per_second: float | None
    layer_grad_norms: list[float] | None
    """Gradient norm of each layer's matrices, mean over the logged steps of the second half of the run; None where
    ``metrics.layer_gradients`` was off."""

    def as_dict(self) -> dict[str, object]:
        """By name."""
        return asdict(self)


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
    threads = max(1, (os.cpu_count() or 1) // (ranks * jobs))

    def bring_to_end(run: GridRun) -> Outcome:
        error = None if is_finished(run.config) else _start(grid, run, ranks, threads)
        outcome = outcome_of(run, error)
        tell(outcome)
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(bring_to_end, grid.runs))


def outcome_of(run: GridRun, error: str | None = None) -> Outcome:
    """What the folder of ``run`` holds now."""
    finished = is_finished(run.config)
    rows = read_metrics(run_folder(run.config) / "metrics.jsonl") if finished else []
    validated: dict[str, Any] = next((row for row in reversed(rows) if "validation/bits_per_byte" in row), {})
    rates = sorted(row["throughput/tokens_per_second"] for row in rows if "throughput/tokens_per_second" in row)
    counted = count_parameters(run.config.model)
    return Outcome(
        id=run.id,
        variant=run.variant,
        seed=run.seed,
        finished=finished,
        error=error,
        bits_per_byte=validated.get("validation/bits_per_byte"),
        loss=validated.get("validation/loss"),
        tokens=int(validated.get("tokens", 0)),
        active_parameters=counted.active,
        kept_parameters=counted.kept,
        tokens_per_second=rates[len(rates) // 2] if rates else None,
        layer_grad_norms=_late_grad_norms(rows, run.config.training.steps, run.config.model.num_layers),
    )


def _late_grad_norms(rows: Sequence[Mapping[str, Any]], steps: int, num_layers: int) -> list[float] | None:
    """By layer, the mean over the rows of the steps after half of ``steps``; None where those have no such norms."""
    names = [layer_name("train/grad_norm", layer) for layer in range(num_layers)]
    late = [row for row in rows if 2 * row["step"] > steps and names[0] in row]
    return [statistics.mean(row[name] for row in late) for name in names] if late else None


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
