"""The comparisons of a grid as Markdown tables and as values for JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from qsparse_moe.ablation.grid.load import Grid
from qsparse_moe.ablation.grid.markdown_table import table
from qsparse_moe.ablation.grid.results import RunResult
from qsparse_moe.ablation.grid.search import Sample, finished_bits, samples
from qsparse_moe.ablation.grid.verdicts import (
    LEVEL,
    MOST_SEEDS,
    CellVerdict,
    ClaimVerdicts,
    Pair,
    axis_label,
    cell_label,
    decide,
    verdict_label,
)

COMPARISONS = "comparisons.json"
"""Name of the file with the verdicts beside ``report.md``."""


def comparison_parts(grid: Grid, results: Sequence[RunResult]) -> list[str]:
    """Return the paragraphs and tables of the verdicts; none if the grid file makes no claim."""
    if not grid.comparisons:
        return []
    known = samples(grid, finished_bits(results))
    decided = decide(grid, known)
    parts = [
        f"Comparisons, by the differences in bits per byte within each seed and their {LEVEL:.0%} intervals (Student's "
        "t over the seeds). A claim holds if the interval of every difference lies on its side, does not hold here if "
        "one lies on the other side, and is not decided otherwise. Intervals are not corrected for the number of "
        f"comparisons: of {_number_of_tests(decided)} differences without any effect, about "
        f"{(1 - LEVEL) * _number_of_tests(decided):.0f} would seem decided.",
        _summary(decided),
        *_by_axis(decided),
        "Differences: loss of the second variant minus loss of the first, mean and interval; for a claim about a gap, "
        "how much this difference shrinks or grows from the first value of the axis. Seeds to decide: with so "
        "many, the interval would decide if mean and standard deviation stayed as measured; runs: the additional "
        f"runs of all variants of the claim{', at their best values' if grid.best_over else ''}.",
        _details(decided),
    ]
    if grid.best_over is not None:
        parts += [
            f"Best value of {grid.best_over} by variant, by the mean over the seeds of the search. (lowest) and "
            "(highest) mark an edge of the search, beyond which a better value may lie; a dash, an incomplete search.",
            _best(grid, known),
        ]
    return parts


def comparisons_dict(grid: Grid, results: Sequence[RunResult]) -> dict[str, Any]:
    """Return the claims, verdicts, and best values as values that JSON can hold.

    Each claim has ``cells`` (one verdict per cell, and with ``cell`` None that over all cells) and ``by_axis`` (one per
    ``axis`` and ``value``, whose differences are means over ``mean_over``). Of a verdict, ``cells`` is the number of
    cells behind its differences, and ``possible_cells`` their number if all had results of the variants.
    """
    known = samples(grid, finished_bits(results))
    best = [
        {"variant": variant, "cell": json.loads(cell), "value": sample.value, "edge": sample.edge}
        for (variant, cell), sample in known.items()
        if grid.best_over is not None
    ]
    return {
        "grid": grid.name,
        "unit": "bits per byte",
        "level": LEVEL,
        "best_over": grid.best_over,
        "best": best,
        "claims": [
            {
                **one.claim.model_dump(exclude_none=True),
                "cells": [_cell_dict(cell) for cell in one.cells],
                "by_axis": [_axis_dict(found) for found in one.by_axis],
            }
            for one in decide(grid, known)
        ],
    }


def _cell_dict(found: CellVerdict) -> dict[str, Any]:
    return {
        "cell": None if found.cell is None else json.loads(found.cell),
        "cells": found.cells,
        "possible_cells": found.possible_cells,
        "verdict": found.verdict,
        "runs_needed": found.runs_needed,
        "pairs": [
            {
                "lower": pair.lower,
                "higher": pair.higher,
                "by_seed": dict(pair.by_seed),
                "difference": pair.mean,
                "spread": pair.spread,
                "interval": None if pair.interval is None else list(pair.interval),
                "verdict": pair.verdict,
                "seeds_needed": pair.seeds_needed,
            }
            for pair in found.pairs
        ],
    }


def _axis_dict(found: CellVerdict) -> dict[str, Any]:
    values = _cell_dict(found)
    ((axis, value),) = values.pop("cell").items()
    return {"axis": axis, "value": value, "mean_over": list(found.mean_over), **values}


def _number_of_tests(decided: Sequence[ClaimVerdicts]) -> int:
    return sum(len(pair.by_seed) > 1 for one in decided for cell in one.every for pair in cell.pairs)


def _summary(decided: Sequence[ClaimVerdicts]) -> str:
    # A claim about a gap has no verdict at the first value of its axis.
    labels = {cell.cell: cell_label(cell.cell) for one in decided for cell in one.cells}
    cells = sorted(labels, key=lambda cell: cell is None)
    rows = []
    for one in decided:
        words = {cell.cell: _word(cell) for cell in one.cells}
        rows.append([one.claim.name, one.claim.source, *(words.get(cell, "–") for cell in cells)])
    return table(["claim", "source", *(labels[cell] for cell in cells)], rows, caption="Verdicts")


def _by_axis(decided: Sequence[ClaimVerdicts]) -> list[str]:
    """Return a paragraph and one table per axis of the verdicts over the cells with one of its values, if any."""
    # Two axes may have the same label.
    labels: dict[tuple[str, tuple[str, ...]], dict[str, str]] = defaultdict(dict)
    for found in (found for one in decided for found in one.by_axis):
        labels[_axis(found), found.mean_over][str(found.cell)] = cell_label(found.cell)
    parts = []
    for (axis, mean_over), own in labels.items():
        rows = []
        for one in decided:
            words = {found.cell: _word_of_several(found) for found in one.by_axis}
            rows.append([one.claim.name, *(words.get(cell, "–") for cell in own)])
        parts += [
            f"By {axis_label(axis)}, mean over {' and '.join(map(axis_label, mean_over))}:",
            table(["claim", *own.values()], rows, caption=f"Verdicts by {axis_label(axis)}"),
        ]
    if not parts:
        return []
    return [
        "Verdicts by the value of one axis, over all cells with this value that have results of the variants. The "
        "differences of a seed are averaged over these cells first, and it counts if it is in each of them. A dash: "
        "such a verdict would repeat that of a cell or that over all cells.",
        *parts,
    ]


def _axis(found: CellVerdict) -> str:
    (axis,) = json.loads(found.cell or "")
    return str(axis)


def _word(found: CellVerdict) -> str:
    # A cell without runs and one whose runs decide nothing are different things.
    return found.verdict if all(pair.by_seed for pair in found.pairs) else "no runs yet"


def _word_of_several(found: CellVerdict) -> str:
    partly = 0 < found.cells < found.possible_cells
    return _word(found) + (f" ({found.cells} of {found.possible_cells} cells)" if partly else "")


def _cells(found: CellVerdict) -> str:
    of_all = f" of {found.possible_cells}" if found.cells < found.possible_cells else ""
    return f"{found.cells}{of_all}"


def _details(decided: Sequence[ClaimVerdicts]) -> str:
    head = ["claim", "where", "cells", "first", "second", "difference", "95 % interval", "seeds", "verdict"]
    rows = []
    for one in decided:
        for cell in one.every:
            rows += [
                [one.claim.name, verdict_label(cell), _cells(cell), *_pair_cells(pair), _runs(cell)]
                for pair in cell.pairs
                if pair.by_seed
            ]
    return table([*head, "seeds to decide", "runs"], rows, caption="Differences")


def _pair_cells(pair: Pair) -> list[str]:
    ends = pair.interval
    interval = "–" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}"
    needed = "–"
    if pair.verdict == "not decided" and ends is not None:
        needed = f"more than {MOST_SEEDS:,}" if pair.seeds_needed is None else str(pair.seeds_needed)
    mean = "–" if pair.mean is None else f"{pair.mean:+.4f}"
    return [pair.lower, pair.higher, mean, interval, str(len(pair.by_seed)), pair.verdict, needed]


def _runs(found: CellVerdict) -> str:
    return "–" if found.runs_needed is None else str(found.runs_needed)


def _best(grid: Grid, known: dict[Any, Sample]) -> str:
    cells = list(dict.fromkeys(grid.cell(run) for run in grid.runs))
    variants = dict.fromkeys(run.entry for run in grid.runs)
    rows = [[variant or "all", *(_best_value(known.get((variant, cell))) for cell in cells)] for variant in variants]
    return table(["variant", *(cell_label(cell) for cell in cells)], rows, caption=f"Best value of {grid.best_over}")


def _best_value(sample: Sample | None) -> str:
    if sample is None:
        return "–"
    return f"{sample.value:g}" + (f" ({sample.edge})" if sample.edge else "")
