"""The figure of the comparisons of a grid: the interval of every difference, by claim and cell."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qsparse_moe.ablation.grid.verdicts import LEVEL, CellVerdict, ClaimVerdicts, verdict_label

_COLUMNS = 3
_COLOURS = {"holds": "tab:blue", "does not hold here": "tab:orange", "not decided": "0.55"}


def draw_comparisons(decided: Sequence[ClaimVerdicts]) -> Figure | None:
    """Draw one panel per claim, with a bar per pair and verdict; None if no pair has two seeds."""
    shown = [one for one in decided if any(_drawn(cell) for cell in one.every)]
    if not shown:
        return None
    columns = min(len(shown), _COLUMNS)
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    # A claim about a longer order has several bars per cell.
    heights = [1.0 + 0.2 * max(sum(len(_drawn(cell)) for cell in one.every) for one in row) for row in rows]
    figure = Figure(figsize=(4.6 * columns, sum(heights)), dpi=120, layout="constrained")
    places = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for position, one in enumerate(shown):
        _panel(figure.add_subplot(places[divmod(position, columns)]), one)
    figure.suptitle(
        f"Differences within each seed, bits per byte, {LEVEL:.0%} intervals: blue holds, orange fails, grey is open",
        fontsize=9,
    )
    return figure


def _drawn(cell: CellVerdict) -> list[int]:
    """Return the positions of the pairs with an interval."""
    return [position for position, pair in enumerate(cell.pairs) if pair.interval is not None]


def _panel(axes: Axes, one: ClaimVerdicts) -> None:
    labels: list[str] = []
    for cell in one.every:
        for position in _drawn(cell):
            pair = cell.pairs[position]
            low, high = pair.interval or (0.0, 0.0)
            axes.plot([low, high], [len(labels)] * 2, color=_COLOURS[pair.verdict], linewidth=2)
            axes.plot((low + high) / 2, len(labels), "o", color=_COLOURS[pair.verdict], markersize=4)
            # Which pair, only where a claim has several.
            names = f": {pair.higher} − {pair.lower}" if len(cell.pairs) > 1 else ""
            labels.append(verdict_label(cell) + names)
    axes.axvline(0, color="0.3", linewidth=0.8)
    for bound in (-1, 1) if one.claim.within else ():
        axes.axvline(bound * (one.claim.within or 0.0), color="0.3", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=7)
    axes.set_title(one.claim.name, fontsize=8)
