"""Decide the claims of a grid file: differences seed by seed, their 95 % intervals, and what it takes to decide more.

Seeds are blocks: the runs of one seed have the same initial values and the same data, so that the difference of two
variants is taken within each seed and its interval is that of a mean over seeds (Student's t).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import t as student_t

from qsparse_moe.ablation.grid.claims import Comparison
from qsparse_moe.ablation.grid.load import Grid
from qsparse_moe.ablation.grid.search import Key, Sample
from qsparse_moe.config.labels import LETTERS, setting_label

LEVEL = 0.95
"""Share of the intervals that contain the true mean, if differences are normal."""
MOST_SEEDS = 1000
"""The largest number of seeds that is proposed for a decision."""

Verdict = Literal["holds", "does not hold here", "not decided"]


@dataclass(frozen=True)
class Pair:
    """The difference of two variants in a cell or over all cells, in bits per byte."""

    lower: str
    """The variant that the claim puts first."""
    higher: str
    by_seed: Mapping[int, float]
    """Loss of ``higher`` minus loss of ``lower``, by seed; for a claim about a gap, the change of this difference that
    the claim calls positive."""
    verdict: Verdict
    seeds_needed: int | None
    """Number of seeds with which the interval would decide at the measured mean and spread; None: decided, unknown with
    fewer than two seeds, or more than ``MOST_SEEDS``."""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None without any."""
        return statistics.mean(self.by_seed.values()) if self.by_seed else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None with fewer than two."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the mean; None with fewer than two seeds."""
        return interval(list(self.by_seed.values()))


@dataclass(frozen=True)
class CellVerdict:
    """What a grid says about one claim in one cell, or over several cells."""

    cell: str | None
    """The cell as ``Grid.cell`` returns it; None: over all cells in which every pair has at least two seeds. For a
    verdict over those of them that have one value of an axis, this axis and value alone."""
    cells: int
    """Number of cells behind the differences."""
    possible_cells: int
    """Number of cells that would be behind them if all had results of the variants."""
    pairs: tuple[Pair, ...]
    mean_over: tuple[str, ...] = ()
    """The axes over whose values the differences are averaged, for a verdict over the cells with one value."""

    @property
    def verdict(self) -> Verdict:
        """``holds`` if every pair does, ``does not hold here`` if one does not, and else ``not decided``."""
        found = {pair.verdict for pair in self.pairs}
        return (
            "does not hold here" if "does not hold here" in found else "holds" if found == {"holds"} else "not decided"
        )

    @property
    def runs_needed(self) -> int | None:
        """Number of additional runs at the best values that would decide; None if unknown, too many, or not needed."""
        open_pairs = [pair for pair in self.pairs if pair.verdict == "not decided"]
        if self.verdict != "not decided" or any(pair.seeds_needed is None for pair in open_pairs):
            return None
        # Each run counts once, also if its variant is in two pairs.
        more: dict[str, int] = {}
        for pair in open_pairs:
            for variant in (pair.lower, pair.higher):
                missing = (pair.seeds_needed or 0) - len(pair.by_seed)
                more[variant] = max(missing, more.get(variant, 0))
        return self.cells * sum(more.values())


@dataclass(frozen=True)
class ClaimVerdicts:
    """What a grid says about one claim: per cell, per value of an axis, and over all cells."""

    claim: Comparison
    cells: tuple[CellVerdict, ...]
    """One verdict per cell, and one over all cells if there are several."""
    by_axis: tuple[CellVerdict, ...]
    """One verdict per value of each axis of the cells, over the cells with this value. None of them repeats a cell or
    all cells: there are none unless two axes vary, and none for a value with a single cell."""

    @property
    def every(self) -> list[CellVerdict]:
        """The verdicts of the cells, those by axis, and that over all cells.

        Without those by axis that have the results of one cell so far, whose differences would be listed twice.
        """
        single = [one for one in self.cells if one.cell is not None]
        known = [one.pairs for one in single]
        return [*single, *(one for one in self.by_axis if one.pairs not in known), *self.cells[len(single) :]]


def decide(grid: Grid, known: Mapping[Key, Sample]) -> list[ClaimVerdicts]:
    """Return the verdicts of every claim of ``grid``, in its order.

    Args:
        grid: the grid.
        known: the losses to compare, from ``samples``.
    """
    cells = list(dict.fromkeys(grid.cell(run) for run in grid.runs))
    return [_verdicts(claim, cells, known) for claim in grid.comparisons]


def cell_label(cell: str | None) -> str:
    """Return a short label of a cell, such as ``1M, steps 100``; ``all`` for the verdict over all cells."""
    if cell is None:
        return "all"
    # A named setting of an axis is its own label.
    words = [
        value if isinstance(value, str) else setting_label(axis, value) for axis, value in json.loads(cell).items()
    ]
    return ", ".join(words) or "all runs"


def axis_label(axis: str) -> str:
    """Return the letter or the last part of the path of an axis, such as ``steps``."""
    return LETTERS.get(axis, axis.rpartition(".")[2])


def verdict_label(found: CellVerdict) -> str:
    """Return the label of the cells of a verdict, such as ``1M, mean over steps``."""
    mean = [f"mean over {' and '.join(map(axis_label, found.mean_over))}"] if found.mean_over else []
    return ", ".join([cell_label(found.cell), *mean])


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of the mean of ``values`` by Student's t; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = statistics.mean(values), _half_width(statistics.stdev(values), len(values))
    return mean - half, mean + half


def seeds_to_decide(mean: float, spread: float, within: float | None = None) -> int | None:
    """Return the least number of seeds whose interval would decide if mean and spread stayed as they are.

    Args:
        mean: mean difference.
        spread: its standard deviation over seeds.
        within: the bound of a claim about closeness; None for an order, which the sign decides.

    Returns:
        The number, at least 2; None if it exceeds ``MOST_SEEDS``.
    """
    # The interval must exclude the nearest bound: 0 for an order, and plus or minus within for closeness.
    distance = abs(mean) if within is None else abs(within - abs(mean))
    seeds = np.arange(2, MOST_SEEDS + 1)
    enough = student_t.ppf((1 + LEVEL) / 2, seeds - 1) * spread / np.sqrt(seeds) < distance
    return int(seeds[enough.argmax()]) if enough.any() else None


def _half_width(spread: float, count: int) -> float:
    return float(student_t.ppf((1 + LEVEL) / 2, count - 1)) * spread / math.sqrt(count)


def _verdicts(claim: Comparison, cells: Sequence[str], known: Mapping[Key, Sample]) -> ClaimVerdicts:
    found = []
    for cell in cells:
        base = _base(claim, cell, cells)
        # A gap is compared with that of the first value of its axis, and not with itself.
        if base == cell:
            continue
        pairs = []
        for lower, higher in claim.pairs:
            by_seed = _differences(known, lower, higher, cell)
            if base is not None:
                by_seed = _changes(claim, _differences(known, lower, higher, base), by_seed)
            pairs.append(_pair(claim, lower, higher, by_seed))
        behind = 1 if base is None else 2
        found.append(CellVerdict(cell, behind, behind, tuple(pairs)))
    # A grid without axes has one cell, and repeating it would read as a second result.
    over_all = [] if len(cells) == 1 else [_over(claim, found, cells)]
    return ClaimVerdicts(claim, (*found, *over_all), tuple(_by_axis(claim, found, cells)))


def _base(claim: Comparison, cell: str, cells: Sequence[str]) -> str | None:
    """Return the cell with the first value of the axis of a claim about a gap; None for other claims."""
    if claim.gap_over is None:
        return None
    place = json.loads(cell)
    first = json.loads(cells[0])[claim.gap_over]
    return json.dumps(place | {claim.gap_over: first})


def _changes(claim: Comparison, base: Mapping[int, float], gap: Mapping[int, float]) -> dict[int, float]:
    sign = 1 if claim.gap_grows_over else -1
    return {seed: sign * (gap[seed] - at_base) for seed, at_base in base.items() if seed in gap}


def _differences(known: Mapping[Key, Sample], lower: str, higher: str, cell: str) -> dict[int, float]:
    """Return the loss of ``higher`` minus that of ``lower`` for every seed that both have in the cell."""
    low, high = known.get((lower, cell)), known.get((higher, cell))
    if low is None or high is None:
        return {}
    return {seed: high.by_seed[seed] - loss for seed, loss in low.by_seed.items() if seed in high.by_seed}


def _by_axis(claim: Comparison, found: Sequence[CellVerdict], cells: Sequence[str]) -> Iterator[CellVerdict]:
    """Yield the verdicts over the cells with one value of an axis, where these are neither one cell nor all."""
    places = [json.loads(cell) for cell in cells]
    values = {axis: list(dict.fromkeys(json.dumps(place[axis]) for place in places)) for axis in places[0]}
    varied = [axis for axis, own in values.items() if len(own) > 1]
    for axis in varied:
        mean_over = tuple(other for other in varied if other != axis)
        for value in values[axis]:
            own = [one for one in found if json.dumps(json.loads(one.cell or "")[axis]) == value]
            if 1 < len(own) < len(found):
                cell = json.dumps({axis: json.loads(value)})
                yield replace(_over(claim, own, cells), cell=cell, mean_over=mean_over)


def _over(claim: Comparison, found: Sequence[CellVerdict], cells: Sequence[str]) -> CellVerdict:
    """Return the verdict over the mean of these cells, seed by seed, with the seeds that every used cell has."""
    used = [one for one in found if all(len(pair.by_seed) > 1 for pair in one.pairs)]
    pairs = []
    for position, (lower, higher) in enumerate(claim.pairs):
        own = [one.pairs[position].by_seed for one in used]
        seeds = [seed for seed in (own[0] if own else ()) if all(seed in by_seed for by_seed in own)]
        means = {seed: statistics.mean(by_seed[seed] for by_seed in own) for seed in seeds}
        pairs.append(_pair(claim, lower, higher, means))
    behind, possible = (
        len({one.cell for one in those} | {base for one in those if (base := _base(claim, one.cell or "", cells))})
        for those in (used, found)
    )
    return CellVerdict(None, behind, possible, tuple(pairs))


def _pair(claim: Comparison, lower: str, higher: str, by_seed: Mapping[int, float]) -> Pair:
    values = list(by_seed.values())
    ends = interval(values)
    # One seed has no spread, so that nothing can be decided or predicted.
    if ends is None:
        return Pair(lower, higher, by_seed, "not decided", None)
    verdict = _verdict(ends, claim.within)
    needed = None
    if verdict == "not decided":
        needed = seeds_to_decide(statistics.mean(values), statistics.stdev(values), claim.within)
    return Pair(lower, higher, by_seed, verdict, needed)


def _verdict(ends: tuple[float, float], within: float | None) -> Verdict:
    low, high = ends
    if within is None:
        return "holds" if low > 0 else "does not hold here" if high < 0 else "not decided"
    if -within <= low and high <= within:
        return "holds"
    return "does not hold here" if low > within or high < -within else "not decided"
