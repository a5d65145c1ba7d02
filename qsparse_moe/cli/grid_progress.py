"""Progress of a grid: on a terminal a bar with the best run so far, otherwise one line per run."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from qsparse_moe.ablation.grid.results import RunResult


class GridProgress:
    """A context manager to pass to ``run_grid`` as ``notify``; several threads may call it."""

    def __init__(self, num_runs: int) -> None:
        self._done, self._num_runs = 0, num_runs
        self._best: RunResult | None = None
        self._lock = threading.Lock()
        self._bar = _make_bar(num_runs) if sys.stderr.isatty() else None

    def __enter__(self) -> GridProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, result: RunResult) -> None:
        """Show the result of one run."""
        with self._lock:
            self._done += 1
            self._best = _better(self._best, result)
            line = f"{result.id}  {_ending(result)}"
            best = f"best {self._best.id} {_bits(self._best)}" if self._best else ""
            # Through the console of the bar, which redraws itself below the line.
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False)
                self._bar.update(self._bar.task_ids[0], completed=self._done, best=best)
            else:
                shown = f"  {best}" if best else ""
                print(f"{self._done}/{self._num_runs}  {line}{shown}", file=sys.stderr, flush=True)


def _better(best: RunResult | None, result: RunResult) -> RunResult | None:
    # A run that failed or was not evaluated has no loss to compare.
    if result.bits_per_byte is None:
        return best
    # The 0.0 is for the type checker only: a best run always has a loss.
    return result if best is None or result.bits_per_byte < (best.bits_per_byte or 0.0) else best


def _ending(result: RunResult) -> str:
    return result.error or _bits(result)


def _bits(result: RunResult) -> str:
    return "no validation" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits per byte"


def _make_bar(num_runs: int) -> Progress:
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Standard output belongs to the report, which may be JSON for another program.
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task("runs", total=num_runs, best="")
    return bar
