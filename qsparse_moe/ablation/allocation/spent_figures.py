"""Figures of where a plan spends loss: by layer and kind of change, and by cell.

L layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsparse_moe.ablation.cell_maps import CellMap, draw_maps, map_table, scale_over
from qsparse_moe.ablation.page.parts import Drawing, Table

ROUTING = "experts per token"


def spent_drawings(spent: Mapping[str, Any], budget: str = "") -> dict[str, Drawing]:
    """Return the figures of the key ``spent`` of one budget, by name; ``budget`` is for the titles, if not empty."""
    after = f", {budget}" if budget else ""
    return {"loss-by-layer": _by_layer(spent, after), "loss-by-cell": _by_cell(spent, after)}


def layer_sums(spent: Mapping[str, Any]) -> tuple[list[int], dict[str, list[float]]]:
    """Return the layers, and by kind (a site, or the experts per token) the sum over the experts of every layer."""
    sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for one in spent["cells"]:
        sums[one["site"].replace("_", " ")][one["layer"]] += one["change"]
    for one in spent["routing"]:
        sums[ROUTING][one["layer"]] += one["change"]
    layers = sorted({layer for by_layer in sums.values() for layer in by_layer})
    return layers, {kind: [by_layer.get(layer, 0.0) for layer in layers] for kind, by_layer in sums.items()}


def _by_layer(spent: Mapping[str, Any], after: str) -> Drawing:
    layers, sums = layer_sums(spent)
    title = f"Loss that the plan spends by layer, estimated, in 1/1000 nats per token{after}"
    figure = Figure(figsize=(min(10.2, 4.6 + 0.5 * len(layers)), 3.8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    stacked_bars(axes, sums)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.set_xlabel("layer")
    axes.set_ylabel("change of the loss,\n1/1000 nats per token")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    rows = [
        (str(layer), *(f"{1000 * values[place]:+.4f}" for values in sums.values()))
        for place, layer in enumerate(layers)
    ]
    return Drawing(title, figure, [Table(title, ("layer", *sums), rows)])


def stacked_bars(axes: Axes, sums: Mapping[str, Sequence[float]]) -> None:
    """Draw the values of every kind in thousandths, one bar per place, with the kinds stacked away from 0."""
    places = len(next(iter(sums.values())))
    above, below = np.zeros(places), np.zeros(places)
    for number, (kind, values) in enumerate(sums.items()):
        heights = 1000 * np.array(values)
        # Gains are stacked downwards from 0, so that no bar covers another.
        begin = np.where(heights >= 0, above, below)
        axes.bar(range(places), heights, bottom=begin, width=0.7, color=f"C{number}", label=kind)
        above, below = above + np.maximum(heights, 0.0), below + np.minimum(heights, 0.0)
    axes.axhline(0.0, color="0.3", lw=0.8)


def _by_cell(spent: Mapping[str, Any], after: str) -> Drawing:
    title = f"Loss that the plan spends by layer, site, and expert, estimated, in 1/1000 nats per token{after}"
    sites = dict.fromkeys(one["site"] for one in spent["cells"])
    panels = [_panel(site.replace("_", " "), [one for one in spent["cells"] if one["site"] == site]) for site in sites]
    if spent["routing"]:
        panels.append(_panel(ROUTING, spent["routing"]))
    scale = scale_over(one["change"] for one in (*spent["cells"], *spent["routing"]))
    figure = draw_maps(panels, scale, title="", missing="no such site", noise=None)
    tables = [map_table(panel) for panel in panels]
    return Drawing(title, figure, [replace(table, caption=f"{table.caption}{after}") for table in tables])


def _panel(title: str, changes: Sequence[Mapping[str, Any]]) -> CellMap:
    layers = tuple(sorted({one["layer"] for one in changes}))
    count = 1 + max(one.get("expert") or 0 for one in changes)
    change_LE = np.full((len(layers), count), np.nan)
    for one in changes:
        change_LE[layers.index(one["layer"]), one.get("expert") or 0] = one["change"]
    return CellMap(title, layers, change_LE, np.zeros(change_LE.shape, bool))
