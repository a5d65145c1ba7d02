"""Figures of sensitivities: heat maps (layers x experts), and the estimate against the evaluation.

L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from qsparse_moe.ablation.cell_maps import CellMap, draw_maps, map_table, scale_over
from qsparse_moe.ablation.page.parts import Drawing, Table
from qsparse_moe.ablation.sensitivity.measure import CellChange
from qsparse_moe.ablation.sensitivity.routing_changes import PlanAgreement, RoutingChange
from qsparse_moe.ablation.sensitivity.stored import Measured
from qsparse_moe.config.schema import Site
from qsparse_moe.errors import naming


def write_figures(drawings: Mapping[str, Drawing], folder: Path) -> list[Path]:
    """Write the figures as PNG files into ``folder`` and return their paths."""
    return [_save(drawing.figure, folder / f"{name}.png") for name, drawing in drawings.items()]


def sensitivity_drawings(found: Measured) -> dict[str, Drawing]:
    """Return the figures by name.

    ``map-SITE`` has one map per S, of the evaluated change if there is one and else of the estimate. ``estimate`` plots
    the estimate against the evaluation and needs both. ``routing`` has the changes of the choices of ranks, and
    ``plans`` the estimates of whole plans against their evaluation, where they were measured.
    """
    drawings: dict[str, Drawing] = {}
    # One scale for all sites, so that their colours can be compared.
    scale = scale_over(_change(change)[0] for change in found.changes)
    for site in dict.fromkeys(change.cell.site for change in found.changes):
        own = [change for change in found.changes if change.cell.site == site]
        drawings[f"map-{site}"] = _maps(site, own, scale)
    if found.exact_seconds is not None:
        drawings["estimate"] = _scatter(found)
    if found.routing:
        drawings["routing"] = _routing(found.routing)
    if found.plans is not None:
        drawings["plans"] = _plans(found.plans)
    return drawings


def _change(change: CellChange) -> tuple[float, tuple[float, float]]:
    """Return the evaluated change and its interval, or the estimated ones if nothing was evaluated."""
    if change.exact is None or change.exact_interval is None:
        return change.estimate, change.estimate_interval
    return change.exact, change.exact_interval


def _maps(site: Site, changes: Sequence[CellChange], scale: Normalize) -> Drawing:
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
    figure = draw_maps(maps, scale, title=title, missing="S of the run", noise=noise)
    # The maps of all sites have the same titles.
    tables = [map_table(replace(one, title=f"{site.replace('_', ' ')}, {one.title}")) for one in maps]
    return Drawing(title, figure, tables)


def _scatter(found: Measured) -> Drawing:
    figure, axes = _square()
    values = sorted({change.sparsity for change in found.changes})
    for value in values:
        own = [change for change in found.changes if change.sparsity == value]
        axes.plot(
            [p.exact or 0.0 for p in own], [p.estimate for p in own], "o", ms=3.5, alpha=0.7, label=f"S={value:.3g}"
        )
    # The 0.0 is for the type checker: this figure is drawn only if every change was evaluated.
    _compare(axes, [p.exact or 0.0 for p in found.changes])
    axes.set_title(f"Spearman {found.agreement[0].spearman:.3f} over {len(found.changes)} changes", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return Drawing("Estimated change of the loss over the evaluated one, for every cell and S", figure, ())


def _plans(plans: PlanAgreement) -> Drawing:
    series = {"estimate": (plans.estimated, plans.spearman)}
    if plans.with_routing is not None:
        series["with evaluated routing"] = (plans.with_routing.estimated, plans.with_routing.spearman)
    figure, axes = _square()
    for (name, (estimated, spearman)), marker in zip(series.items(), "o^", strict=False):
        axes.plot(plans.evaluated, estimated, marker, ms=4, alpha=0.7, label=f"{name}, Spearman {spearman:.3f}")
    _compare(axes, plans.evaluated)
    axes.set_title(f"{len(plans.evaluated)} random plans", fontsize=10)
    axes.legend(fontsize=8)
    title = "Estimated change of the loss over the evaluated one, for random plans of both sparsities"
    columns = zip(*(estimated for estimated, _ in series.values()), plans.evaluated, strict=True)
    rows = [(str(number), *(f"{value:+.6f}" for value in values)) for number, values in enumerate(columns)]
    return Drawing(title, figure, [Table(title, ("plan", *series, "evaluated"), rows)])


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 4.6), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def _compare(axes: Axes, evaluated: Sequence[float]) -> None:
    """Add the diagonal, the labels, and scales that are logarithmic away from 0."""
    ends = [min(evaluated), max(evaluated)]
    axes.plot(ends, ends, color="grey", lw=0.8, zorder=0)
    median = max(float(np.median(np.abs(evaluated))), 1e-6)
    # A whole decade: otherwise the tick labels around 0 overlap.
    scale = 10.0 ** np.ceil(np.log10(median))
    axes.set_xscale("symlog", linthresh=scale)
    axes.set_yscale("symlog", linthresh=scale)
    axes.set_xlabel("evaluated change of the loss, nats per token")
    axes.set_ylabel("estimated change of the loss, nats per token")
    axes.tick_params(axis="both", labelsize=8)


def _routing(changes: Sequence[RoutingChange]) -> Drawing:
    """Draw the change of the loss over the layers, one line per choice of ranks, and the estimates as crosses."""
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for number, choice in enumerate(dict.fromkeys(change.cell.choice for change in changes)):
        own = [change for change in changes if change.cell.choice == choice]
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
    axes.set_xticks(sorted({change.cell.layer for change in changes}))
    axes.set_xlabel("layer")
    axes.set_ylabel("change of the loss, nats per token")
    title = "Other ranks of choice in one layer" + (" (crosses: estimated)" if changes[0].exact is not None else "")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    # The page has a table of its own with the same values.
    return Drawing("Change of the loss with other ranks of choice in one layer", figure, ())


def _save(figure: Figure, file: Path) -> Path:
    with naming(file):
        FigureCanvasAgg(figure).print_png(str(file))
    return file
