"""Figures of sensitivities: heat maps (layers x experts), and the estimate against the evaluation.

L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from qsparse_moe.ablation.cell_maps import CellMap, draw_maps, scale_over
from qsparse_moe.ablation.sensitivity.measure import CellChange, Sensitivity
from qsparse_moe.config.schema import Site
from qsparse_moe.errors import naming
from qsparse_moe.metrics.tensorboard import write_pictures


def write_figures(found: Sensitivity, folder: Path) -> list[Path]:
    """Write the PNG files into ``folder`` and return their paths.

    ``map-SITE.png`` has one map per S, of the evaluated change if there is one and else of the estimate.
    ``estimate.png`` plots the estimate against the evaluation and needs both.
    """
    return [_save(figure, folder / f"{name}.png") for name, figure in _figures(found).items()]


def write_images(found: Sensitivity, tensorboard: Path, step: int) -> None:
    """Add the same figures to the TensorBoard folder of a run, under ``sensitivity/``."""
    pictures = {f"sensitivity/{name}": _pixels(figure) for name, figure in _figures(found).items()}
    write_pictures(tensorboard, pictures, step)


def _figures(found: Sensitivity) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    # One scale for all sites, so that their colours can be compared.
    scale = scale_over(_change(change)[0] for change in found.changes)
    for site in dict.fromkeys(change.cell.site for change in found.changes):
        own = [change for change in found.changes if change.cell.site == site]
        figures[f"map-{site}"] = _maps(site, own, scale)
    if found.exact_seconds is not None:
        figures["estimate"] = _scatter(found)
    if found.routing:
        figures["routing"] = _routing(found)
    return figures


def _change(change: CellChange) -> tuple[float, tuple[float, float]]:
    """Return the evaluated change and its interval, or the estimated ones if nothing was evaluated."""
    if change.exact is None or change.exact_interval is None:
        return change.estimate, change.estimate_interval
    return change.exact, change.exact_interval


def _maps(site: Site, changes: Sequence[CellChange], scale: Normalize) -> Figure:
    """Draw one map per S side by side, and hatch the cells whose interval contains 0."""
    values = sorted({change.sparsity for change in changes})
    # Models with dense layers have experts in some layers only.
    layers = tuple(sorted({change.cell.layer for change in changes}))
    num_experts = 1 + max(change.cell.expert or 0 for change in changes)
    maps = []
    for value in values:
        change_LE, noise_LE = np.full((len(layers), num_experts), np.nan), np.zeros((len(layers), num_experts), bool)
        for one in changes:
            if one.sparsity == value:
                index = layers.index(one.cell.layer), one.cell.expert or 0
                change, (low, high) = _change(one)
                change_LE[index], noise_LE[index] = change, low <= 0 <= high
        maps.append(CellMap(f"S={value:.3g}", layers, change_LE, noise_LE))
    kind = "estimated" if changes[0].exact is None else "evaluated"
    title = (
        f"{site.replace('_', ' ')}: change of the loss with another S in one cell, against the plan of the run ({kind})"
    )
    noise = "noise: the 95% interval over documents contains 0"
    return draw_maps(maps, scale, title=title, missing="S of the run", noise=noise)


def _scatter(found: Sensitivity) -> Figure:
    figure = Figure(figsize=(6.2, 4.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    values = sorted({change.sparsity for change in found.changes})
    for value in values:
        own = [change for change in found.changes if change.sparsity == value]
        axes.plot(
            [p.exact or 0.0 for p in own], [p.estimate for p in own], "o", ms=3.5, alpha=0.7, label=f"S={value:.3g}"
        )
    # The 0.0 is for the type checker: this figure is drawn only if every change was evaluated.
    ends = [min(p.exact or 0.0 for p in found.changes), max(p.exact or 0.0 for p in found.changes)]
    axes.plot(ends, ends, color="grey", lw=0.8, zorder=0)
    median = max(float(np.median([abs(p.exact or 0.0) for p in found.changes])), 1e-6)
    # A whole decade: otherwise the tick labels around 0 overlap.
    scale = 10.0 ** np.ceil(np.log10(median))
    axes.set_xscale("symlog", linthresh=scale)
    axes.set_yscale("symlog", linthresh=scale)
    axes.set_xlabel("evaluated change of the loss, nats per token")
    axes.set_ylabel("estimated change of the loss, nats per token")
    axes.tick_params(axis="both", labelsize=8)
    axes.set_title(f"Spearman {found.agreement[0].spearman:.3f} over {len(found.changes)} changes", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _routing(found: Sensitivity) -> Figure:
    """Draw the change of the loss over the layers, one line per choice of ranks, and the estimates as crosses."""
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for number, choice in enumerate(dict.fromkeys(change.cell.choice for change in found.routing)):
        own = [change for change in found.routing if change.cell.choice == choice]
        layers = [change.cell.layer for change in own]
        shown = [change.estimate if change.exact is None else change.exact for change in own]
        ends = [change.exact_interval or change.estimate_interval for change in own]
        # Above and below the mark; a percentile interval need not contain it.
        reach = [[max(0.0, y - low) for y, (low, _) in zip(shown, ends, strict=True)]]
        reach.append([max(0.0, high - y) for y, (_, high) in zip(shown, ends, strict=True)])
        axes.errorbar(layers, shown, reach, fmt="o-", ms=4, lw=1, capsize=2, color=f"C{number}", label=choice.name)
        if own[0].exact is not None:
            axes.plot(layers, [change.estimate for change in own], "x", ms=6, color=f"C{number}")
    axes.axhline(0.0, color="grey", lw=0.8)
    axes.set_xticks(sorted({change.cell.layer for change in found.routing}))
    axes.set_xlabel("layer")
    axes.set_ylabel("change of the loss, nats per token")
    evaluated = found.routing[0].exact is not None
    axes.set_title("Other ranks of choice in one layer" + (" (crosses: estimated)" if evaluated else ""), fontsize=10)
    axes.legend(fontsize=8)
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _save(figure: Figure, file: Path) -> Path:
    with naming(file):
        FigureCanvasAgg(figure).print_png(str(file))
    return file
