"""The figures of a grid, each drawn only where the rows of its results have the axes for it."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

Row = Mapping[str, Any]
_SHAPE = ("hidden_size", "num_layers")
_SHAPE_PATHS = ("model.hidden_size", "model.num_layers", "model.num_heads", "model.num_kv_heads")
_EXPERT_PATHS = ("model.moe.num_experts", "model.moe.experts_per_token", "model.moe.expert_hidden_size")
_S_PATHS = ("model.sparsity.default", "model.sparsity.sites.")
_LOSS = "validation loss, nats a token"
_MOST_PANELS = 4
_MOST_NAMES = 6
_WIDE = 8.0
"""Costs that differ by more than this factor stand on a logarithmic axis."""
_PAPER = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}


class Point(NamedTuple):
    """A point of a grid: the rows of its seeds as one."""

    row: Row
    loss: float
    spread: float
    """Standard deviation over the seeds; 0 with one seed."""


def draw_figures(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Write the PNG files that ``rows`` of results have the axes for into ``folder``: their titles by file name."""
    points = points_of(rows)
    drawings = {
        "loss-by-sparsity.png": ("Validation loss by S and experts", loss_by_sparsity(points)),
        "loss-by-parameters.png": ("Validation loss by active parameters", loss_by_parameters(points)),
        "iso-loss.png": ("Validation loss over E/A and S", iso_loss(points)),
    }
    found = {}
    for name, (title, figure) in drawings.items():
        if figure is not None:
            part = folder / f"{name}.part"
            FigureCanvasAgg(figure).print_png(str(part))
            os.replace(part, folder / name)
            found[name] = title
    return found


def points_of(rows: Sequence[Row]) -> list[Point]:
    """The finished runs, the seeds of a variant as one point."""
    by_variant: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["finished"] and row["loss"] is not None:
            by_variant[row["variant"]].append(row)
    points = []
    for found in by_variant.values():
        losses = [row["loss"] for row in found]
        points.append(Point(found[0], statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0))
    return points


def loss_by_sparsity(points: Sequence[Point]) -> Figure | None:
    """Loss against mean S, a line for every E and A (and whatever else varies), a panel for every width and depth.

    None where S does not vary, or where different points set it at different sites.
    """
    if len({point.row["sparsity"] for point in points}) < 2 or not _one_way_of_sparsity(points):
        return None
    panels = _by(points, _SHAPE)
    if len(panels) > _MOST_PANELS:
        return None
    figure, axes = _panels(panels)
    for axis, panel in zip(axes, panels.values(), strict=True):
        for position, (label, line) in enumerate(_lines(panel).items()):
            line = sorted(line, key=lambda point: point.row["sparsity"])
            x, y = [point.row["sparsity"] for point in line], [point.loss for point in line]
            bars = [point.spread for point in line]
            axis.errorbar(x, y, bars, label=label, color=f"C{position}", marker="o", markersize=4, capsize=2)
        axis.set_xlabel("mean S of the plan")
        axis.set_ylabel(_LOSS)
    _legend(figure, axes)
    return figure


def loss_by_parameters(points: Sequence[Point]) -> Figure | None:
    """Loss against the parameters that a token uses, by routing and by what Q-Sparse keeps, with the Pareto fronts.

    None where neither varies.
    """
    names = {
        "active_parameters": "thousand parameters active by routing",
        "kept_parameters": "thousand of them kept by Q-Sparse",
    }
    shown = [name for name in names if len({point.row[name] for point in points}) > 1]
    if not shown:
        return None
    figure, axes = _panels(dict.fromkeys(names[name] for name in shown))
    for axis, name in zip(axes, shown, strict=True):
        colored = _scatter(axis, points, name)
        axis.set_xlabel(names[name])
        axis.set_title("")
    figure.colorbar(colored, ax=axes, label="mean S of the plan")
    return figure


def pareto_front(points: Sequence[Point], cost: str) -> list[Point]:
    """The points that no other beats in loss at the same or a lower ``cost``, by rising cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.row[cost], point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def iso_loss(points: Sequence[Point]) -> Figure | None:
    """Contours of equal loss over E/A and S, a panel for every width, depth and A with a complete map of them.

    None where there is no such panel.
    """
    if not _one_way_of_sparsity(points):
        return None
    by_panel = _by(points, (*_SHAPE, "experts_per_token"))
    if len(by_panel) > _MOST_PANELS:
        by_panel = _by(points, _SHAPE)
    maps = {name: found for name, panel in by_panel.items() if (found := _complete_map(panel)) is not None}
    if not maps or len(maps) > _MOST_PANELS:
        return None
    figure, axes = _panels(maps)
    levels = _levels([loss for _, _, losses in maps.values() for line in losses for loss in line])
    for axis, (ratios, sparsities, losses) in zip(axes, maps.values(), strict=True):
        filled = axis.contourf(sparsities, ratios, losses, levels=levels, cmap="viridis_r", extend="both")
        axis.contour(sparsities, ratios, losses, levels=levels, colors="black", linewidths=0.5)
        x, y = [s for s in sparsities for _ in ratios], [r for _ in sparsities for r in ratios]
        axis.plot(x, y, "k.", markersize=4, clip_on=False)
        axis.set_yscale("log", base=2)
        axis.set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.set_xlabel("mean S of the plan")
        axis.set_ylabel("E / A")
    figure.colorbar(filled, ax=axes, label=_LOSS, format="%.4f")
    return figure


def _one_way_of_sparsity(points: Sequence[Point]) -> bool:
    """Whether the points that set S set it at the same sites; those that set none are dense."""
    ways = {frozenset(path for path in point.row["settings"] if path.startswith(_S_PATHS)) for point in points}
    return len(ways - {frozenset()}) <= 1


def _by(points: Sequence[Point], names: Sequence[str]) -> dict[str, list[Point]]:
    """Panels: the points by what they are of ``names``."""
    letters = {"hidden_size": "D", "num_layers": "L", "experts_per_token": "A"}
    varying = [name for name in names if len({point.row[name] for point in points}) > 1]
    panels: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        panels[", ".join(f"{letters[name]} {point.row[name]}" for name in varying)].append(point)
    return panels


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    known = (*_SHAPE_PATHS, *_EXPERT_PATHS, *_S_PATHS)
    lines: dict[str, list[Point]] = defaultdict(list)
    values: dict[str, set[str]] = defaultdict(set)
    for point in points:
        for path in {path for other in points for path in other.row["settings"]}:
            values[path].add(repr(point.row["settings"].get(path)))
    for point in points:
        # What is the same in the whole panel tells no line from another.
        others = {k: v for k, v in point.row["settings"].items() if not k.startswith(known) and len(values[k]) > 1}
        label = f"E {point.row['num_experts']}, A {point.row['experts_per_token']}"
        lines[", ".join([label, *(f"{k.rpartition('.')[2]} {v}" for k, v in others.items())])].append(point)
    return lines


def _panels(titles: Mapping[str, Any]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1 + 4 * len(titles), 4), dpi=120, layout="constrained")
    axes = [figure.add_subplot(1, len(titles), position + 1) for position in range(len(titles))]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
    return figure, axes


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Beside the panels where all have the same lines, else in each."""
    handles = [axis.get_legend_handles_labels() for axis in axes]
    if len(axes) > 1 and all(labels == handles[0][1] for _, labels in handles):
        figure.legend(*handles[0], loc="outside right upper", fontsize=7)
    else:
        for axis in axes:
            axis.legend(fontsize=7)


def _scatter(axis: Axes, points: Sequence[Point], cost: str) -> PathCollection:
    front = pareto_front(points, cost)
    x, y = [point.row[cost] / 1e3 for point in front], [point.loss for point in front]
    axis.step(x, y, "k--", where="post", linewidth=1, label="Pareto front", zorder=1)
    for point, left, low in zip(front, x, y, strict=True) if len(front) <= _MOST_NAMES else ():
        axis.annotate(
            point.row["variant"], (left, low), (4, -9), textcoords="offset points", fontsize=6, zorder=3, bbox=_PAPER
        )
    values = [point.row[cost] for point in points]
    axis.margins(x=0.25)
    if max(values) > _WIDE * min(values):
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(_LOSS)
    axis.legend(fontsize=7)
    costs, losses = [point.row[cost] / 1e3 for point in points], [point.loss for point in points]
    return axis.scatter(costs, losses, c=[point.row["sparsity"] for point in points], cmap="viridis", zorder=2)


def _complete_map(points: Sequence[Point]) -> tuple[list[float], list[float], list[list[float]]] | None:
    """E/A, S and the loss at each; None unless there is one point at each of at least 2 x 2."""
    # A mean over other numbers of experts is rounded otherwise.
    found = {(p.row["num_experts"] / p.row["experts_per_token"], round(p.row["sparsity"], 6)): p.loss for p in points}
    ratios, sparsities = sorted({ratio for ratio, _ in found}), sorted({sparsity for _, sparsity in found})
    if min(len(ratios), len(sparsities)) < 2 or len(found) < len(points) or len(found) < len(ratios) * len(sparsities):
        return None
    return ratios, sparsities, [[found[ratio, sparsity] for sparsity in sparsities] for ratio in ratios]


def _levels(losses: Sequence[float]) -> list[float]:
    least, most = min(losses), max(losses)
    step = max(most - least, 1e-6) / 10
    return [least + step * index for index in range(11)]
