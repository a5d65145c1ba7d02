"""Loss against S: at every site, or at the places that a grid scans, each with a line of its own."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from qsparse_moe.ablation.grid.panels import LOSS, legend, panels_of, split_by
from qsparse_moe.ablation.grid.variants import (
    Cell,
    VariantResult,
    cells_label,
    changed_cells,
    choice_labels,
    is_sparsity,
    other_settings,
    seeds_text,
    varied_sparsity,
)

_SHAPE = ("hidden_size", "num_layers")
_SHAPE_PATHS = ("model.hidden_size", "model.num_layers", "model.num_heads", "model.num_kv_heads")
_EXPERT_PATHS = ("model.moe.num_experts", "model.moe.experts_per_token", "model.moe.expert_hidden_size")
_MOST_PANELS = 4
_MOST_LINES = 12
_MOST_CHARACTERS = 70
MEAN = "mean S of the plan"


def loss_by_sparsity(points: Sequence[VariantResult]) -> Figure | None:
    """Draw loss against S, a line for every E and A (and whatever else varies), a panel for every width and depth.

    S is that of the places where the grid varies it, which the axis names, or the plan's mean where that is the same.
    None where S does not vary, or where different points set it at different places.
    """
    axis_label, sparsities = sparsity_axis(points)
    if len(set(sparsities)) < 2:
        return None
    x_of = dict(zip(map(id, points), sparsities, strict=True))
    panels = split_by(points, _SHAPE)
    if len(panels) > _MOST_PANELS:
        return None
    figure, axes = panels_of(panels)
    for axis, panel in zip(axes, panels.values(), strict=True):
        for position, (label, line) in enumerate(_lines(panel).items()):
            line = sorted(line, key=lambda point: x_of[id(point)])
            x, y = [x_of[id(point)] for point in line], [point.loss for point in line]
            bars = [point.spread for point in line] if any(point.spread for point in line) else None
            axis.errorbar(x, y, bars, label=label, color=f"C{position % 10}", marker="o", markersize=4, capsize=2)
        axis.set_xlabel(axis_label)
        axis.set_ylabel(LOSS)
    legend(figure, axes, seeds_text(points))
    return figure


def sparsity_axis(points: Sequence[VariantResult]) -> tuple[str, list[float]]:
    """Return the label of an axis of S and the S of every point; no values where the points have no S in common."""
    places = varied_sparsity(points)
    if places:
        by_point = list(zip(*places.values(), strict=True)) if _complete(places, len(points)) else []
        if not by_point or any(len(set(values)) > 1 for values in by_point):
            return "", []
        found = [values[0] for values in by_point]
        if all(math.isclose(value, point.row["sparsity"]) for value, point in zip(found, points, strict=True)):
            return MEAN, found
        return f"S at {shortened(cells_label(places))}", found
    ways = {frozenset(path for path in point.row["settings"] if is_sparsity(path)) for point in points}
    whole = not any(
        path.startswith(("model.sparsity.overrides", "model.sparsity.plan")) for way in ways for path in way
    )
    return (MEAN, [point.row["sparsity"] for point in points]) if len(ways - {frozenset()}) <= 1 and whole else ("", [])


def shortened(places: str) -> str:
    """Return ``places``, or where that is long a word for it."""
    return places if len(places) <= _MOST_CHARACTERS else "the places that the grid varies"


def _complete(places: Mapping[Cell, Sequence[float]], num_points: int) -> bool:
    return all(len(values) == num_points for values in places.values())


def loss_by_cell(points: Sequence[VariantResult]) -> Figure | None:
    """Draw the change of loss against the S of the places that a point changes from the first, a line for every place.

    The change is that against the first point, seed by seed: what a seed does to both alike is no part of its spread.
    None where no place has two S beside the first point's, or where there are more lines than can be told apart.
    """
    if not points or sparsity_axis(points)[1]:
        return None
    base, lines = points[0], defaultdict[tuple[Cell, ...], list[tuple[float, VariantResult]]](list)
    for point in points[1:]:
        changed = changed_cells(base, point)
        if changed and len(set(changed.values())) == 1 and other_settings(point) == other_settings(base):
            lines[tuple(changed)].append((next(iter(changed.values())), point))
    if not lines or max(map(len, lines.values())) < 2 or len(lines) > _MOST_LINES:
        return None
    figure, axes = panels_of([""])
    axes[0].axhline(0.0, color="0.5", linewidth=0.8, linestyle=":", label=str(base.row["variant"]), zorder=0)
    for position, (places, line) in enumerate(lines.items()):
        begin = _sparsity_at(base, places, line[0][1])
        line = sorted([*([] if begin is None else [(begin, base)]), *line], key=lambda pair: pair[0])
        changes = [_change(base, point) for _, point in line]
        shift = 0.006 * (position - (len(lines) - 1) / 2)  # beside each other where they would lie over each other
        axes[0].errorbar(
            [s + shift for s, _ in line],
            [change for change, _ in changes],
            [spread for _, spread in changes] if any(spread for _, spread in changes) else None,
            label=shortened(cells_label(places)),
            color=f"C{position % 10}",
            linestyle="-" if position < 10 else "--",
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes[0].set_xlabel("S at the place that the line names")
    axes[0].set_ylabel("change of the validation loss, nats per token")
    legend(figure, axes, seeds_text(points))
    return figure


def _change(base: VariantResult, point: VariantResult) -> tuple[float, float]:
    """The mean over the seeds that both have of the change, and its standard deviation; 0 where they share one."""
    apart = [point.by_seed[seed] - base.by_seed[seed] for seed in base.by_seed if seed in point.by_seed]
    if not apart:
        return point.loss - base.loss, 0.0
    return statistics.mean(apart), statistics.stdev(apart) if len(apart) > 1 else 0.0


def _sparsity_at(base: VariantResult, places: Sequence[Cell], other: VariantResult) -> float | None:
    """S of ``base`` at places where ``other`` has another; None where they differ."""
    both = varied_sparsity((base, other))
    values = {both[place][0] for place in places}
    return values.pop() if len(values) == 1 else None


def _lines(points: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """The points of a panel by their label: E and A, and the names of whatever else varies beside S."""
    known = (*_SHAPE_PATHS, *_EXPERT_PATHS)
    paths = {path for point in points for path in point.row["settings"] if not is_sparsity(path) and path not in known}
    # What is the same in the whole panel tells no line from another.
    telling = {path for path in paths if len({repr(point.row["settings"].get(path)) for point in points}) > 1}
    lines: dict[str, list[VariantResult]] = defaultdict(list)
    for point in points:
        experts = f"E={point.row['num_experts']}, A={point.row['experts_per_token']}"
        lines[", ".join([experts, *choice_labels(point, telling)])].append(point)
    return lines
