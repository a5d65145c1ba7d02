"""Figures of one plan: S as heat maps (layers x experts x sites), and experts per token by layer.

L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from qsparse_moe.ablation.grid.panels import colour_bar
from qsparse_moe.ablation.page.parts import Drawing, Table
from qsparse_moe.config.schema import Site
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.data.packing import Array
from qsparse_moe.sparsity.plan import SparsityPlan

WIDE = 10.2
"""Width in inches of the widest figure that a page need not shrink."""
_MISSING = "0.82"
_MOST_BESIDE = 22
"""Columns that fit beside each other with a number in every cell."""
_MOST_LABELLED = 16
"""Columns of one panel up to which its cells have a number."""
_COLOURS = "YlGnBu"


def plan_drawings(plan: SparsityPlan, budget: str = "") -> dict[str, Drawing]:
    """Return the heat maps of S by name, and the experts per token if the plan sets them.

    Args:
        plan: the plan.
        budget: what the titles name it by, where there are plans of several budgets.
    """
    after = f", {budget}" if budget else ""
    found = {"plan": _maps(plan, after)}
    if plan.experts_per_token:
        found["experts-per-token"] = _experts(plan, after)
    return found


def sparsity_panels(plan: SparsityPlan) -> dict[str, tuple[list[str], Array]]:
    """Return the columns and S ``(L, columns)`` of every panel: the sites without experts together, then each site
    with experts. nan where a layer has no such site."""
    layers = sorted({layer for layer, _ in plan.values})
    sites: list[Site] = list(dict.fromkeys(site for _, site in plan.values))
    narrow = [site for site in sites if site not in EXPERT_SITES]
    panels: dict[str, tuple[list[str], Array]] = {}
    if narrow:
        values = np.array([[plan.values.get((layer, site), (np.nan,))[0] for site in narrow] for layer in layers])
        panels["sites without experts"] = [site.replace("_", " ") for site in narrow], values
    for site in (site for site in sites if site in EXPERT_SITES):
        count = max(len(plan.values.get((layer, site), ())) for layer in layers)
        missing = (np.nan,) * count
        own = np.array([plan.values.get((layer, site), missing) for layer in layers], float)
        panels[site.replace("_", " ")] = [str(expert) for expert in range(count)], own
    return panels


def _maps(plan: SparsityPlan, after: str) -> Drawing:
    panels = sparsity_panels(plan)
    layers = [str(layer) for layer in sorted({layer for layer, _ in plan.values})]
    title = f"S of the plan by layer, site, and expert{after}"
    lines = _lines(panels)
    figure = Figure(figsize=(WIDE, line_height(len(layers)) * len(lines)), dpi=100, layout="constrained")
    # Every line is a grid of its own, so that a site without experts is as wide as its columns need.
    rows = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for part, line in zip(rows, lines, strict=True):
        shares = [_columns(panels[name][0]) for name in line]
        # A line of few columns ends early: as wide as the others, its cells would be bars.
        blank = [_MOST_BESIDE - sum(shares)] if 2 * sum(shares) < _MOST_BESIDE else []
        places = list(part.subplots(1, len(line) + len(blank), squeeze=False, width_ratios=[*shares, *blank])[0])
        while len(places) > len(line):
            places.pop().set_axis_off()
        for axes, name in zip(places, line, strict=True):
            image = sparsity_panel(axes, name, layers, *panels[name])
        colour_bar(part, places, image, "S", pad=0.02)
    tables = [
        Table(
            f"S at {name}{after}",
            ("layer", *columns),
            [
                (layer, *("–" if np.isnan(value) else f"{value:.4f}" for value in values))
                for layer, values in zip(layers, own, strict=True)
            ],
        )
        for name, (columns, own) in panels.items()
    ]
    return Drawing(title, figure, tables)


def line_height(num_layers: int) -> float:
    """Return the height in inches of a line of heat maps with one row per layer."""
    return max(1.2, min(8.0, 0.34 * num_layers)) + 1.0


def _columns(names: Sequence[str]) -> int:
    # The names of sites need more width than the numbers of experts.
    return len(names) if names[0].isdecimal() else 2 * len(names) + 1


def _lines(panels: dict[str, tuple[list[str], Array]]) -> list[list[str]]:
    """Return the panels of each line of the figure."""
    lines: list[list[str]] = []
    for name, (columns, _) in panels.items():
        used = sum(_columns(panels[other][0]) for other in lines[-1]) if lines else 0
        if lines and used + _columns(columns) <= _MOST_BESIDE:
            lines[-1].append(name)
        else:
            lines.append([name])
    return lines


def sparsity_panel(axes: Axes, name: str, layers: Sequence[str], columns: Sequence[str], own: Array) -> AxesImage:
    """Draw S ``(L, columns)`` as one heat map, and return its image for the colour bar; nan is grey."""
    image = axes.imshow(own, cmap=_COLOURS, vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_facecolor(_MISSING)
    axes.set_title(name, fontsize=9)
    axes.set_ylabel("layer", fontsize=8)
    step = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
    is_numbered = columns[0].isdecimal()
    labels = list(columns) if is_numbered else [column.replace(" ", "\n") for column in columns]
    step = -(-len(columns) // 32)
    axes.set_xticks(range(0, len(columns), step), labels[::step], fontsize=8 if is_numbered else 7)
    if is_numbered:
        axes.set_xlabel("expert", fontsize=8)
    if len(columns) <= _MOST_LABELLED and len(layers) <= 24:
        for row, column in np.argwhere(~np.isnan(own)):
            value = float(own[row, column])
            colour = "white" if _is_dark(value) else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _is_dark(value: float) -> bool:
    # Luminance by ITU-R BT.601.
    red, green, blue, _ = colormaps[_COLOURS](value)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _experts(plan: SparsityPlan, after: str) -> Drawing:
    layers = sorted(plan.experts_per_token)
    title = f"Experts per token by layer, and the share of the router weight at which a layer stops{after}"
    counts = [plan.experts_per_token[layer] for layer in layers]
    figure = Figure(figsize=(min(WIDE, 3.4 + 0.5 * len(layers)), 2.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(layers)), counts, color="#4a7fb5", width=0.7)
    for place, layer in enumerate(layers):
        if layer in plan.top_p:
            axes.annotate(
                f"top-p\n{plan.top_p[layer]:g}",
                (place, counts[place]),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
            )
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.set_yticks(range(max(counts) + 1), [str(count) for count in range(max(counts) + 1)], fontsize=8)
    axes.set_ylim(0, 1.35 * max(counts) + 0.5)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylabel("experts per token,\nat most", fontsize=8)
    rows = [
        (str(layer), str(count), f"{plan.top_p.get(layer, 1.0):g}") for layer, count in zip(layers, counts, strict=True)
    ]
    head = ("layer", "experts per token, at most", "share of the router weight")
    return Drawing(title, figure, [Table(title, head, rows)])
