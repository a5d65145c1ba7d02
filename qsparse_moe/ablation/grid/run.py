"""The runs of a grid, each in its own process; finished ones are kept, interrupted ones go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

from qsparse_moe.ablation.grid.children import Children
from qsparse_moe.ablation.grid.load import Grid, GridRun
from qsparse_moe.ablation.grid.placement import Placement
from qsparse_moe.ablation.grid.results import RunResult
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.rules import check_trainable
from qsparse_moe.errors import CheckpointError, ConfigError, naming
from qsparse_moe.runs.folder import is_finished, run_folder
from qsparse_moe.training.distributed.ranks import num_cores

LOG_TAIL = 400


class GridResult(NamedTuple):
    """What the runs of a grid came to."""

    results: list[RunResult]
    """In the order of the grid."""
    stopped_by: int
    """Number of the signal that stopped it, else 0."""


def run_grid(
    grid: Grid, placement: Placement | None = None, *, notify: Callable[[RunResult], None] = lambda result: None
) -> GridResult:
    """Bring every run of ``grid`` to its end; a broken one is reported, and the others go on.

    SIGINT and SIGTERM stop the runs that are under way, each with a checkpoint from which the next call goes on.

    Raises:
        ConfigError: a run that has not begun has settings with which its router would not learn; no run is started.

    Args:
        grid: its configs.
        placement: None is one after the other, a process each.
        notify: called with every result as it comes, from several threads; not after a stop.
    """
    placement = placement or Placement()
    for run in grid.runs:
        if not run_folder(run.config).exists():
            _check_trainable(run)
    slots: SimpleQueue[tuple[str, ...]] = SimpleQueue()
    for slot in placement.slots():
        slots.put(slot)

    with Children() as children, ThreadPoolExecutor(placement.jobs) as pool:

        def bring_to_end(run: GridRun) -> RunResult:
            slot = slots.get()
            try:
                error = None if is_finished(run.config) else _start(grid, run, placement, slot, children)
            except (ConfigError, CheckpointError) as refused:  # the folder is that of another run
                error = str(refused)
            finally:
                slots.put(slot)
            result = result_of(grid, run, error)
            if not children.stopped_by:
                notify(result)
            return result

        return GridResult(list(pool.map(bring_to_end, grid.runs)), children.stopped_by)


def _check_trainable(run: GridRun) -> None:
    try:
        check_trainable(run.config)
    except ConfigError as error:
        raise ConfigError(f"variant {run.variant}: {error}") from None


def _start(grid: Grid, run: GridRun, placement: Placement, slot: tuple[str, ...], children: Children) -> str | None:
    """Train ``run`` in processes of its own; what stopped or broke it, None where it came to its end."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    file = grid.folder / f"{run.id}.yaml"
    with naming(file):
        file.write_text(config_to_yaml(run.config), "utf-8")
    log = grid.folder / f"{run.id}.log"
    environment = placement.environment(slot, num_cores(), given=os.environ)
    code = children.run(placement.command(file, slot), log, environment)
    if code == 0 and is_finished(run.config):
        return None
    if children.stopped_by:
        name = signal.Signals(children.stopped_by).name
        return f"{'not started' if code is None else 'stopped'}, {name}; the same command goes on from here"
    text = log.read_text("utf-8", errors="replace").strip()
    return f"exit code {code}, see {log}: ...{text[-LOG_TAIL:]}"
