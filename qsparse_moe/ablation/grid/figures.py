"""The figures of a grid, each drawn only where the rows of its results have the axes for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from qsparse_moe.ablation.grid.expert_figures import expert_maps
from qsparse_moe.ablation.grid.panels import LOSS, colour_bar, panels_of, split_by
from qsparse_moe.ablation.grid.scan_figures import MEAN, loss_by_cell, loss_by_sparsity, sparsity_axis
from qsparse_moe.ablation.grid.variants import Row, VariantResult, variant_results
from qsparse_moe.errors import naming

_SHAPE = ("hidden_size", "num_layers")
_MOST_PANELS = 4
_MOST_NAMES = 6
_WIDE = 8.0
"""Costs that differ by more than this factor stand on a logarithmic axis."""
_PAPER = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}


def draw_figures(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Write the PNG files that ``rows`` of results have the axes for into ``folder``: their titles by file name."""
    points = variant_results(rows)
    drawings = {
        "loss-by-sparsity.png": ("Validation loss by S and experts", loss_by_sparsity(points)),
        "loss-by-place.png": ("Validation loss by S at each place that is changed", loss_by_cell(points)),
        "loss-by-expert.png": ("Change of the validation loss by the expert that is changed", expert_maps(points)),
        "loss-by-parameters.png": ("Validation loss by active parameters", loss_by_parameters(points)),
        "iso-loss.png": ("Validation loss over E/A and S", iso_loss(points)),
    }
    found = {}
    for name, (title, figure) in drawings.items():
        if figure is not None:
            part = folder / f"{name}.part"
            with naming(part):
                FigureCanvasAgg(figure).print_png(str(part))
            os.replace(part, folder / name)
            found[name] = title
    return found


def loss_by_parameters(points: Sequence[VariantResult]) -> Figure | None:
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
    figure, axes = panels_of(dict.fromkeys(names[name] for name in shown))
    for axis, name in zip(axes, shown, strict=True):
        colored = _scatter(axis, points, name)
        axis.set_xlabel(names[name])
        axis.set_title("")
    colour_bar(figure, axes, colored, MEAN)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", fontsize=7)
    return figure


def pareto_front(points: Sequence[VariantResult], cost: str) -> list[VariantResult]:
    """The points that no other beats in loss at the same or a lower ``cost``, by rising cost."""
    front: list[VariantResult] = []
    for point in sorted(points, key=lambda point: (point.row[cost], point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def iso_loss(points: Sequence[VariantResult]) -> Figure | None:
    """Contours of equal loss over E/A and S, a panel for every width, depth and A with a complete map of them.

    None where there is no such panel.
    """
    if sparsity_axis(points)[0] != MEAN:
        return None
    by_panel = split_by(points, (*_SHAPE, "experts_per_token"))
    if len(by_panel) > _MOST_PANELS:
        by_panel = split_by(points, _SHAPE)
    maps = {name: found for name, panel in by_panel.items() if (found := _complete_map(panel)) is not None}
    if not maps or len(maps) > _MOST_PANELS:
        return None
    figure, axes = panels_of(maps)
    levels = _levels([loss for _, _, losses in maps.values() for line in losses for loss in line])
    for axis, (ratios, sparsities, losses) in zip(axes, maps.values(), strict=True):
        filled = axis.contourf(sparsities, ratios, losses, levels=levels, cmap="viridis_r", extend="both")
        axis.contour(sparsities, ratios, losses, levels=levels, colors="black", linewidths=0.5)
        x, y = [s for s in sparsities for _ in ratios], [r for _ in sparsities for r in ratios]
        axis.plot(x, y, "k.", markersize=4, clip_on=False)
        axis.set_yscale("log", base=2)
        axis.set_yticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.set_xlabel(MEAN)
        axis.set_ylabel("E / A")
    colour_bar(figure, axes, filled, LOSS, format="%.4f")
    return figure


def _name(point: VariantResult) -> str:
    """The labels of the point's variant and of its settings of the axes."""
    labels = [label for label, _ in point.row.get("choices") or ()]
    return ", ".join(labels) or str(point.row["variant"])


def _scatter(axis: Axes, points: Sequence[VariantResult], cost: str) -> PathCollection:
    front = pareto_front(points, cost)
    x, y = [point.row[cost] / 1e3 for point in front], [point.loss for point in front]
    axis.step(x, y, "k--", where="post", linewidth=1, label="Pareto front", zorder=1)
    middle = (min(point.row[cost] for point in points) + max(point.row[cost] for point in points)) / 2e3
    for point, left, low in zip(front, x, y, strict=True) if len(front) <= _MOST_NAMES else ():
        away = 4 if left <= middle else -4  # towards the middle: the names may be long
        side = "left" if away > 0 else "right"
        axis.annotate(
            _name(point),
            (left, low),
            (away, -9),
            textcoords="offset points",
            ha=side,
            fontsize=6,
            zorder=3,
            bbox=_PAPER,
        )
    values = [point.row[cost] for point in points]
    axis.margins(x=0.25, y=0.1)
    if max(values) > _WIDE * min(values):
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(LOSS)
    costs, losses = [point.row[cost] / 1e3 for point in points], [point.loss for point in points]
    return axis.scatter(costs, losses, c=[point.row["sparsity"] for point in points], cmap="viridis", zorder=2)


def _complete_map(points: Sequence[VariantResult]) -> tuple[list[float], list[float], list[list[float]]] | None:
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
