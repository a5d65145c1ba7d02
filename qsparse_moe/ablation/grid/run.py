"""Train the runs of a grid, each in its own process. Finished runs are not repeated, interrupted runs resume."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import NamedTuple

from qsparse_moe.ablation.grid.children import Children
from qsparse_moe.ablation.grid.dense_comparison import comparison_command, dense_figures, is_compared
from qsparse_moe.ablation.grid.load import Grid, GridRun
from qsparse_moe.ablation.grid.placement import Placement
from qsparse_moe.ablation.grid.results import RunResult
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.ablation.grid.schedule import Schedule
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.config.rules import check_trainable
from qsparse_moe.errors import CheckpointError, ConfigError, naming
from qsparse_moe.runs.folder import is_finished, run_folder
from qsparse_moe.training.distributed.ranks import num_cores

logger = logging.getLogger(__name__)

LOG_TAIL = 400
"""Number of characters of the output of a failed run that its error quotes."""


class GridResult(NamedTuple):
    """The results of all runs of a grid."""

    results: list[RunResult]
    """One result per run that the grid needs, in its order."""
    stopped_by: int
    """Number of the signal that stopped the grid, or 0."""


def run_grid(
    grid: Grid, placement: Placement | None = None, *, notify: Callable[[RunResult], None] = lambda result: None
) -> GridResult:
    """Train every run of ``grid`` to its end, except those that it has from an earlier report.

    A failed run is reported, and the others continue.

    SIGINT, SIGTERM, and SIGUSR1 stop the running processes, each with a checkpoint from which the next call resumes.

    Args:
        grid: the grid.
        placement: the placement of its runs; None means one after the other, in one process each.
        notify: called with every new result as it is complete, from several threads; not after a stop.

    Raises:
        ConfigError: a run that has not started has settings with which its router would not learn; no run is started.
    """
    placement = placement or Placement()
    # Started runs were checked before their first step, and a grid must be able to resume them.
    for run in grid.runs:
        if run.id not in grid.earlier and not run_folder(run.config).exists():
            _check_trainable(run)
    slots: SimpleQueue[tuple[str, ...]] = SimpleQueue()
    # A queue of slots, so that a finished run frees its devices for the next one.
    for slot in placement.slots():
        slots.put(slot)

    # Threads suffice, because each of them only waits for the processes of a run.
    with Children() as children, ThreadPoolExecutor(placement.jobs) as pool:

        def train_to_end(run: GridRun) -> RunResult:
            if run.id in grid.earlier:
                return grid.earlier[run.id]
            slot = slots.get()
            try:
                error = None if is_finished(run.config) else _start(grid, run, placement, slot, children)
                if error is None and is_compared(grid, run) and dense_figures(grid, run) is None:
                    _compare(grid, run, placement, slot, children)
            except (ConfigError, CheckpointError) as refused:  # the folder belongs to a run with other settings
                error = str(refused)
            # Also after an error, or the remaining runs would wait for this slot forever.
            finally:
                slots.put(slot)
            result = result_of(grid, run, error)
            if not children.stopped_by:
                notify(result)
            return result

        schedule = Schedule(grid)
        running: set[Future[RunResult]] = set()
        while True:
            while len(running) < placement.jobs and (following := schedule.next()) is not None:
                running.add(pool.submit(train_to_end, following))
            if not running:
                return GridResult(schedule.results, children.stopped_by)
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for one in ended:
                schedule.ended(one.result())


def _check_trainable(run: GridRun) -> None:
    try:
        check_trainable(run.config)
    except ConfigError as error:
        raise ConfigError(f"variant {run.variant}: {error}") from None


def _start(grid: Grid, run: GridRun, placement: Placement, slot: tuple[str, ...], children: Children) -> str | None:
    """Train ``run`` in its own processes; return the reason why it did not finish, or None."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    file = grid.folder / f"{run.id}.yaml"
    with naming(file):
        file.write_text(config_to_yaml(run.config), "utf-8")
    log = grid.folder / f"{run.id}.log"
    environment = placement.environment(slot, num_cores(), given=os.environ)
    code = children.run(placement.command(file, slot), log, environment)
    # The exit code alone does not prove that the last checkpoint is complete.
    if code == 0 and is_finished(run.config):
        return None
    if children.stopped_by:
        name = signal.Signals(children.stopped_by).name
        return f"{'not started' if code is None else 'stopped'}, {name}; the same command resumes it"
    # A process that was killed may have stopped inside a character.
    text = log.read_text("utf-8", errors="replace").strip()
    return f"exit code {code}, see {log}: ...{text[-LOG_TAIL:]}"


def _compare(grid: Grid, run: GridRun, placement: Placement, slot: tuple[str, ...], children: Children) -> None:
    """Compare a finished run with itself at S = 0, in a process of its own; a failure is logged and reported."""
    log = grid.folder / f"{run.id}.comparison.log"
    environment = placement.environment(slot, num_cores(), given=os.environ)
    code = children.run(comparison_command(grid, run), log, environment)
    # A stop is no failure: the next call of the verb compares the run.
    if code and not children.stopped_by:
        logger.warning("%s: the comparison with S = 0 failed (exit code %d); see %s", run.id, code, log)
