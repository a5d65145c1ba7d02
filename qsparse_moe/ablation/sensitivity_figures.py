"""Pictures of sensitivities: heat maps layers x experts, and estimate against evaluation. L layers, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from qsparse_moe.ablation.sensitivity import Point, Sensitivity
from qsparse_moe.config.schema import Site
from qsparse_moe.metrics.tensorboard import write_pictures

_MOST_LABELLED = 160


def write_figures(found: Sensitivity, folder: Path) -> list[Path]:
    """Write the PNG files into ``folder``; their paths.

    ``map-SITE.png``, a map for each S, of what was evaluated or else estimated; and where both are there
    ``estimate.png``, all points against each other.
    """
    return [_save(figure, folder / f"{name}.png") for name, figure in _figures(found).items()]


def write_images(found: Sensitivity, tensorboard: Path, step: int) -> None:
    """Add the same pictures to a run's TensorBoard folder, under ``sensitivity/``."""
    pictures = {f"sensitivity/{name}": _pixels(figure) for name, figure in _figures(found).items()}
    write_pictures(tensorboard, pictures, step)


def _figures(found: Sensitivity) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for site in dict.fromkeys(point.cell.site for point in found.points):
        own = [point for point in found.points if point.cell.site == site]
        figures[f"map-{site}"] = _maps(site, own)
    if found.exact_seconds is not None:
        figures["estimate"] = _scatter(found)
    return figures


def _maps(site: Site, points: Sequence[Point]) -> Figure:
    """One map for each S side by side; each has its own colours, white is no change."""
    values = sorted({point.sparsity for point in points})
    layers = sorted({point.cell.layer for point in points})
    num_experts = 1 + max(point.cell.expert or 0 for point in points)
    wide, high = max(2.6, 0.55 * num_experts + 1.4), 1.5 + 0.4 * len(layers)
    columns = min(len(values), 3)
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(max(5.8, columns * wide), rows * high + 0.4), dpi=100, layout="constrained")
    kind = "estimated" if points[0].exact is None else "exact"
    figure.suptitle(f"{site.replace('_', ' ')}: change of loss, 1/1000 nats a token, {kind}", fontsize=10)
    for place, value in enumerate(values):
        axes = figure.add_subplot(rows, columns, place + 1)
        map_LE = np.full((len(layers), num_experts), np.nan)
        for point in points:
            if point.sparsity == value:
                change = point.estimate if point.exact is None else point.exact
                map_LE[layers.index(point.cell.layer), point.cell.expert or 0] = 1000 * change
        largest = max(float(np.nanmax(np.abs(map_LE))), 1e-9)
        axes.imshow(map_LE, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -largest, largest), aspect="auto")
        axes.set_title(f"S = {value:.3g}", fontsize=9)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        _label_experts(axes, num_experts)
        if map_LE.size <= _MOST_LABELLED:
            _write_values(axes, map_LE, largest)
    return figure


def _label_experts(axes: Axes, num_experts: int) -> None:
    if num_experts == 1:
        axes.set_xticks([])
        return
    step = -(-num_experts // 16)
    axes.set_xticks(range(0, num_experts, step), [str(e) for e in range(0, num_experts, step)], fontsize=8)
    axes.set_xlabel("expert", fontsize=8)


def _write_values(axes: Axes, map_LE: np.ndarray, largest: float) -> None:
    for row, column in np.argwhere(~np.isnan(map_LE)):
        value = map_LE[row, column]
        text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
        colour = "white" if abs(value) > 0.6 * largest else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _scatter(found: Sensitivity) -> Figure:
    figure = Figure(figsize=(5.2, 4.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    values = sorted({point.sparsity for point in found.points})
    for value in values:
        own = [point for point in found.points if point.sparsity == value]
        axes.plot(
            [p.exact or 0.0 for p in own], [p.estimate for p in own], "o", ms=3.5, alpha=0.7, label=f"S = {value:.3g}"
        )
    ends = [min(p.exact or 0.0 for p in found.points), max(p.exact or 0.0 for p in found.points)]
    axes.plot(ends, ends, color="grey", lw=0.8, zorder=0)
    median = max(float(np.median([abs(p.exact or 0.0) for p in found.points])), 1e-6)
    scale = 10.0 ** np.ceil(np.log10(median))  # a whole decade, or the labels around 0 lie over each other
    axes.set_xscale("symlog", linthresh=scale)
    axes.set_yscale("symlog", linthresh=scale)
    axes.set_xlabel("change of loss by evaluation, nats a token")
    axes.set_ylabel("estimated, nats a token")
    axes.tick_params(axis="both", labelsize=8)
    axes.set_title(f"Spearman {found.agreement[0].spearman:.3f} over {len(found.points)} points", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _save(figure: Figure, file: Path) -> Path:
    FigureCanvasAgg(figure).print_png(str(file))
    return file
