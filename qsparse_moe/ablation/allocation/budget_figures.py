"""Figures that set the joint plans of all budgets beside each other: what they choose, and where they spend loss.

L layers, B budgets. All of them are made from the content of ``allocation.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsparse_moe.ablation.allocation.budget import parse_budget
from qsparse_moe.ablation.allocation.compare import DENSE
from qsparse_moe.ablation.allocation.joint_plans import JOINT
from qsparse_moe.ablation.allocation.plan_figures import WIDE, line_height, sparsity_panel
from qsparse_moe.ablation.allocation.spent_figures import ROUTING, layer_sums, stacked_bars
from qsparse_moe.ablation.grid.panels import colour_bar
from qsparse_moe.ablation.page.parts import Drawing, Table
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.data.packing import Array
from qsparse_moe.sparsity.plan import SparsityPlan

_BESIDE = 3
"""Heat maps per line of the figure."""


def budget_drawings(budgets: Sequence[Mapping[str, Any]]) -> dict[str, Drawing]:
    """Return the figures of several budgets in ascending order, by name; none of one budget.

    Where the loss is spent is drawn of those budgets of which it was recorded.
    """
    if len(budgets) < 2:
        return {}
    found = {"plans-by-budget": _plans(budgets)}
    spent = [budget for budget in budgets if budget.get("spent")]
    return {**found, "loss-by-budget": _spent(spent)} if spent else found


def joint_plan(budget: Mapping[str, Any]) -> SparsityPlan:
    """Return the joint plan of one budget of the JSON."""
    return SparsityPlan.from_json(json.dumps(budget["plans"][JOINT]))


def against_dense(budget: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the evaluated difference of the joint plan to the dense model, with its interval."""
    (found,) = (one for one in budget["joint_less"] if one["against"] == DENSE)
    return dict(found)


def _plans(budgets: Sequence[Mapping[str, Any]]) -> Drawing:
    plans = [joint_plan(budget) for budget in budgets]
    labels = [parse_budget(budget["budget"]).amount for budget in budgets]
    layers = sorted({layer for plan in plans for layer, _ in plan.values})
    rows, panels = [str(layer) for layer in layers], _means(plans, layers)
    routed = any(plan.experts_per_token for plan in plans)
    num_lines = -(-(len(panels) + routed) // _BESIDE)
    figure = Figure(figsize=(WIDE, line_height(len(layers)) * num_lines), dpi=100, layout="constrained")
    places = list(figure.subplots(num_lines, _BESIDE, squeeze=False).flat)
    for axes, (name, mean_LB) in zip(places, panels.items(), strict=False):
        image = sparsity_panel(axes, name, rows, labels, mean_LB)
    tables = [
        Table(f"S at {name}, by budget", ("layer", *labels), _rows(rows, mean_LB)) for name, mean_LB in panels.items()
    ]
    if routed:
        kept_LB = np.array([[_experts_kept(plan, layer) for plan in plans] for layer in layers])
        texts = [[_experts_text(plan, layer) for plan in plans] for layer in layers]
        _experts_panel(places[len(panels)], rows, labels, kept_LB, texts)
        each = [(row, *own) for row, own in zip(rows, texts, strict=True)]
        tables.append(Table("Experts per token, at most, by budget", ("layer", *labels), each))
    for axes in places[: len(panels) + routed]:
        axes.set_xlabel("budget", fontsize=8)
    for axes in places[len(panels) + routed :]:
        axes.set_axis_off()
    colour_bar(figure, places, image, "S", pad=0.02)
    return Drawing("The joint plan of every budget: S, and experts per token", figure, tables)


def _means(plans: Sequence[SparsityPlan], layers: Sequence[int]) -> dict[str, Array]:
    """Return S ``(L, B)`` of every site, the mean over the experts; nan where a layer has no such site."""
    sites = dict.fromkeys(site for plan in plans for _, site in plan.values)
    return {
        site.replace("_", " ") + (", mean of the experts" if site in EXPERT_SITES else ""): np.array(
            [
                [plan.sparsity(layer, site) if (layer, site) in plan.values else np.nan for plan in plans]
                for layer in layers
            ]
        )
        for site in sites
    }


def _rows(layers: Sequence[str], values_LB: Array) -> list[tuple[str, ...]]:
    return [
        (layer, *("–" if np.isnan(value) else f"{value:.4f}" for value in own))
        for layer, own in zip(layers, values_LB, strict=True)
    ]


def _experts_kept(plan: SparsityPlan, layer: int) -> float:
    """Return a number that grows with the experts per token and with the share at which a layer stops, for colours."""
    return plan.experts_per_token.get(layer, np.nan) - (1.0 - plan.top_p.get(layer, 1.0))


def _experts_text(plan: SparsityPlan, layer: int) -> str:
    if layer not in plan.experts_per_token:
        return "–"
    share = f", top-p {plan.top_p[layer]:g}" if layer in plan.top_p else ""
    return f"{plan.experts_per_token[layer]}{share}"


def _experts_panel(
    axes: Axes, layers: Sequence[str], labels: Sequence[str], kept_LB: Array, texts: Sequence[Sequence[str]]
) -> None:
    # Light up to the largest value, so that black digits can be read everywhere.
    axes.imshow(kept_LB, cmap="Oranges", vmin=0.0, vmax=1.8 * max(1.0, np.nanmax(kept_LB)), aspect="auto")
    axes.set_facecolor("0.82")
    axes.set_title("experts per token at most, share p of the weight", fontsize=9)
    axes.set_ylabel("layer", fontsize=8)
    step = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), layers[::step], fontsize=8)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    if len(layers) <= 24:
        for row, column in np.argwhere(~np.isnan(kept_LB)):
            text = texts[row][column].replace(", top-p ", "\np ")
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5)


def _spent(budgets: Sequence[Mapping[str, Any]]) -> Drawing:
    title = "Loss that the joint plan of every budget spends, in 1/1000 nats per token"
    by_budget = [layer_sums(budget["spent"]) for budget in budgets]
    kinds = dict.fromkeys(kind for _, sums in by_budget for kind in sums if kind != ROUTING)
    sums = {kind: [sum(own.get(kind, ())) for _, own in by_budget] for kind in (*kinds, ROUTING)}
    figure = Figure(figsize=(7.4, 4.0), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    stacked_bars(axes, sums)
    evaluated = [against_dense(budget) for budget in budgets]
    values = [1000 * one["difference"] for one in evaluated]
    # A percentile interval need not contain the mean.
    reach = [
        [max(0.0, value - 1000 * one["interval"][0]) for value, one in zip(values, evaluated, strict=True)],
        [max(0.0, 1000 * one["interval"][1] - value) for value, one in zip(values, evaluated, strict=True)],
    ]
    axes.errorbar(
        range(len(budgets)), values, reach, fmt="D", ms=4, capsize=3, lw=1.2, color="black", label="evaluated, in all"
    )
    axes.set_xticks(range(len(budgets)), [budget["budget"].partition("@")[0] for budget in budgets], fontsize=8)
    axes.set_ylabel("change of the loss,\n1/1000 nats per token")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    names = [budget["budget"] for budget in budgets]
    kinds_table = Table(
        f"{title}: by kind of change",
        ("budget", *sums),
        [(name, *(f"{1000 * own[place]:+.4f}" for own in sums.values())) for place, name in enumerate(names)],
    )
    layers = by_budget[0][0]
    layers_table = Table(
        f"{title}: by layer",
        ("budget", *(f"layer {layer}" for layer in layers)),
        [
            (name, *(f"{1000 * sum(own[place] for own in one.values()):+.4f}" for place in range(len(layers))))
            for name, (_, one) in zip(names, by_budget, strict=True)
        ],
    )
    return Drawing(title, figure, [kinds_table, layers_table])
