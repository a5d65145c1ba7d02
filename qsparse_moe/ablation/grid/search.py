"""The best value of each variant on the axis of ``best_over``, and the runs that a grid therefore needs.

Imports no torch.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from qsparse_moe.ablation.grid.load import Grid, GridRun
from qsparse_moe.ablation.grid.results import RunResult
from qsparse_moe.ablation.grid.run_result import result_of

Key = tuple[str | None, str]
"""Name of a variant and the cell of the other axes, as ``Grid.cell`` returns it."""


class Sample(NamedTuple):
    """The losses of one variant in one cell, in bits per byte, at its best value of the axis of ``best_over``."""

    by_seed: Mapping[int, float]
    """Loss of every finished run at that value, by seed."""
    value: float | None = None
    """The best value: that with the lowest mean over the seeds of the search; None without ``best_over``."""
    edge: Literal["lowest", "highest"] | None = None
    """Whether the best value is the lowest or the highest of the search, so that a better one may lie beyond."""


def finished_bits(results: Iterable[RunResult]) -> dict[str, float]:
    """Return the loss of every finished run, in bits per byte, by its id."""
    return {
        result.id: result.bits_per_byte for result in results if result.finished and result.bits_per_byte is not None
    }


def samples(grid: Grid, bits: Mapping[str, float]) -> dict[Key, Sample]:
    """Return the losses to compare, by variant and cell.

    Args:
        grid: the grid.
        bits: the loss of every finished run, in bits per byte, by its id.

    Returns:
        One sample per variant and cell; none where a search has an unfinished run, because its best value is unknown.
    """
    runs: dict[Key, list[GridRun]] = defaultdict(list)
    for run in grid.runs:
        runs[run.entry, grid.cell(run)].append(run)
    found = {}
    for key, own in runs.items():
        sample = sample_of(grid, own, bits)
        if sample is not None:
            found[key] = sample
    return found


def is_needed(grid: Grid, run: GridRun, known: Mapping[Key, Sample]) -> bool:
    """Return whether the run belongs to the search or has the best value of its variant in its cell."""
    if not run.only_best or grid.best_over is None:
        return True
    sample = known.get((run.entry, grid.cell(run)))
    return sample is not None and sample.value == run.place[grid.best_over]


def sample_of(grid: Grid, runs: Sequence[GridRun], bits: Mapping[str, float]) -> Sample | None:
    """Return the losses of ``runs``, which are those of one variant in one cell; None if their search is unfinished."""
    if grid.best_over is None:
        return Sample({run.seed: bits[run.id] for run in runs if run.id in bits})
    searched: dict[float, dict[int, float | None]] = defaultdict(dict)
    for run in runs:
        if not run.only_best:
            searched[run.place[grid.best_over]][run.seed] = bits.get(run.id)
    # Extra seeds of a part of the grid would favour the values that have them.
    common = set.intersection(*(set(losses) for losses in searched.values()))
    means: dict[float, float] = {}
    for value, losses in searched.items():
        own = [loss for seed, loss in losses.items() if seed in common and loss is not None]
        if len(own) < len(common):
            return None
        means[value] = statistics.mean(own)
    best = min(means, key=lambda value: means[value])
    edge: Literal["lowest", "highest"] | None = None
    # A cell whose other values are excluded has no search, and so no edge.
    if len(means) > 1 and best in (min(means), max(means)):
        edge = "lowest" if best == min(means) else "highest"
    at_best = [run for run in runs if run.place[grid.best_over] == best]
    return Sample({run.seed: bits[run.id] for run in at_best if run.id in bits}, best, edge)


def results_so_far(grid: Grid) -> list[RunResult]:
    """Return the results that the folders of a grid hold now, of the runs that it needs."""
    results = {run.id: result_of(grid, run) for run in grid.runs if not run.only_best}
    known = samples(grid, finished_bits(results.values())) if grid.best_over else {}
    needed = [run for run in grid.runs if is_needed(grid, run, known)]
    return [results.get(run.id) or result_of(grid, run) for run in needed]
