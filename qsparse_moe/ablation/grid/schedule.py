"""Which run of a grid starts next: the first in the order of the grid that waits for no other. Imports no torch."""

from __future__ import annotations

from collections import defaultdict

from qsparse_moe.ablation.grid.load import Grid, GridRun
from qsparse_moe.ablation.grid.results import RunResult
from qsparse_moe.ablation.grid.search import Key, finished_bits, is_needed, sample_of


class Schedule:
    """The runs of a grid, in the order in which they may start.

    A run waits for the shorter lengths of its own folder and, if only the best value of its variant needs it, for the
    search of that value. It waits for nothing else, so that as many runs are trained at a time as there is room for.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting = list(grid.runs)
        self._results: dict[str, RunResult] = {}
        # The ids of the runs that have neither ended nor turned out not to be needed.
        self._open = {run.id for run in grid.runs}
        self._same_search: dict[Key, list[GridRun]] = defaultdict(list)
        for run in grid.runs:
            self._same_search[self._key(run)].append(run)
        self._waits_for: dict[str, set[str]] = {}
        in_folder: dict[str, set[str]] = defaultdict(set)
        for run in grid.runs:
            shorter = in_folder[run.config.training.name]
            search = self._same_search[self._key(run)] if self._depends_on_search(run) else []
            self._waits_for[run.id] = shorter | {one.id for one in search if not one.only_best}
            shorter.add(run.id)

    def next(self) -> GridRun | None:
        """Return a run to start, once; None if the others wait, or if there are no others."""
        for run in list(self._waiting):
            if self._waits_for[run.id] & self._open:
                continue
            self._waiting.remove(run)
            if self._is_needed(run):
                return run
            self._open.remove(run.id)
        return None

    def ended(self, result: RunResult) -> None:
        """Take the result of a run that ``next`` returned, finished or not."""
        self._open.remove(result.id)
        self._results[result.id] = result

    @property
    def results(self) -> list[RunResult]:
        """The results of the runs that ended, in the order of the grid."""
        return [self._results[run.id] for run in self._grid.runs if run.id in self._results]

    def _key(self, run: GridRun) -> Key:
        return run.entry, self._grid.cell(run)

    def _depends_on_search(self, run: GridRun) -> bool:
        return run.only_best and self._grid.best_over is not None

    def _is_needed(self, run: GridRun) -> bool:
        if not self._depends_on_search(run):
            return True
        key = self._key(run)
        own = self._same_search[key]
        best = sample_of(
            self._grid, own, finished_bits(self._results[one.id] for one in own if one.id in self._results)
        )
        return is_needed(self._grid, run, {key: best} if best else {})
