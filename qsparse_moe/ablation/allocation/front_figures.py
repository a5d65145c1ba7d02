"""Figures of the plans of an allocation: the front, and every plan beside the joint one with its interval.

All of them are made from the content of ``allocation.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qsparse_moe.ablation.allocation.compare import DENSE, UNIFORM
from qsparse_moe.ablation.allocation.joint_plans import A_ALONE, JOINT, S_ALONE, UNIFORM_BOTH
from qsparse_moe.ablation.page.parts import Drawing, Table

UNITS = {"parameters": "parameters per token", "flops": "FLOPs per token", "bytes": "bytes per step", "ms": "ms"}
LOSS = "loss on held-out text, nats per token"
# Random and greedy plans are far above the others and would set the scale.
_DRAWN = (JOINT, S_ALONE, A_ALONE, UNIFORM, UNIFORM_BOTH)
_COLOURS = {name: f"C{number}" for number, name in enumerate(_DRAWN)} | {DENSE: "0.45"}

Place = Callable[[Mapping[str, Any], Mapping[str, Any]], float]
"""Returns where a plan lies on the x axis, from its budget and its outcome."""


def front_drawings(content: Mapping[str, Any]) -> dict[str, Drawing]:
    """Return the loss over the measured cost by name, and over tokens per second if they were measured."""
    dense_cost, unit = content["dense"]["cost"], UNITS[content["quantity"]]
    drawings = {
        "front": _front(
            content,
            f"Loss over the measured cost: {unit}, as a share of the dense model's",
            f"{unit}, measured, as a share of the dense model's",
            lambda budget, one: one["cost"] / dense_cost,
        )
    }
    # Written after every budget, and --decode measures all or none.
    if content["budgets"][0]["decoding"]:
        drawings["front-decoding"] = _front(
            content,
            "Loss over tokens per second of the decode engine native, measured",
            "tokens per second of decoding, measured",
            lambda budget, one: budget["decoding"][one["name"]]["tokens_per_second"],
        )
    return drawings


def _front(content: Mapping[str, Any], title: str, label: str, place: Place) -> Drawing:
    figure = Figure(figsize=(7.4, 4.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    rows = []
    for name in _DRAWN:
        pairs = [(budget, one) for budget in content["budgets"] for one in budget["outcomes"] if one["name"] == name]
        points = sorted((place(budget, one), one["loss"], budget["budget"]) for budget, one in pairs)
        if points:
            x, y, budgets = zip(*points, strict=True)
            axes.plot(x, y, "o-", ms=4, lw=1.2, color=_COLOURS[name], label=name)
            rows += [(name, budget, f"{a:.6g}", f"{b:.4f}") for a, b, budget in zip(x, y, budgets, strict=True)]
    dense = content["dense"]["loss"]
    axes.axhline(dense, color=_COLOURS[DENSE], lw=0.8, ls="--", label=DENSE)
    _scale_by_joint_and_uniform(axes, content)
    axes.set_xlabel(label)
    axes.set_ylabel(LOSS)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    rows.append((DENSE, "", "", f"{dense:.4f}"))
    return Drawing(title, figure, [Table(title, ("plan", "budget", label, "loss"), rows)])


def _scale_by_joint_and_uniform(axes: Axes, content: Mapping[str, Any]) -> None:
    """Set the y axis by these two, because A alone is far above the others at small budgets."""
    shown = [one["loss"] for budget in content["budgets"] for one in budget["outcomes"]]
    kept = [
        one["loss"] for budget in content["budgets"] for one in budget["outcomes"] if one["name"] in (JOINT, UNIFORM)
    ]
    low, high = min(*kept, content["dense"]["loss"]), max(*kept, content["dense"]["loss"])
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    if max(shown) > high + margin:
        axes.set_title("points above the axis are left out; the values are below the figure", fontsize=8, loc="left")


def difference_drawings(content: Mapping[str, Any]) -> dict[str, Drawing]:
    """Return the loss of the joint plan less that of every other plan, with intervals, by name of the figure."""
    budgets = content["budgets"]
    first = budgets[0]
    found = {"methods": methods(f"Joint plan less every other plan, {first['budget']}", first["joint_less"])}
    if first["joint_less_after_training"]:
        title = f"Joint plan less every other plan, {first['budget']}, after {content['train_steps']} steps of training"
        found["methods-after-training"] = methods(title, first["joint_less_after_training"])
    if len(budgets) > 1:
        found["methods-by-budget"] = _by_budget(budgets)
    return found


def methods(title: str, differences: Sequence[Mapping[str, Any]], *, name: str = "against") -> Drawing:
    """Draw one difference with its interval per line; ``name`` is the key of the label of a line."""
    figure = Figure(figsize=(7.4, 1.3 + 0.3 * len(differences)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for row, one in enumerate(differences):
        low, high = one["interval"]
        colour = _decided_colour(low, high)
        axes.plot([low, high], [row, row], color=colour, lw=2)
        axes.plot(one["difference"], row, "o", color=colour, ms=5)
    axes.axvline(0.0, color="0.3", lw=0.8)
    axes.set_yticks(range(len(differences)), [one[name] for one in differences], fontsize=8)
    axes.set_ylim(len(differences) - 0.5, -0.5)
    _symmetric_log(axes, "x", [one["difference"] for one in differences])
    axes.set_xlabel("difference of the loss, nats per token (blue: lower, orange: higher, grey: undecided)", fontsize=8)
    axes.tick_params(labelsize=8)
    rows = [
        (one[name], f"{one['difference']:+.6f}", f"{one['interval'][0]:+.6f}", f"{one['interval'][1]:+.6f}")
        for one in differences
    ]
    return Drawing(title, figure, [Table(title, ("plan", "difference", "interval from", "to"), rows)])


def _decided_colour(low: float, high: float) -> str:
    if low <= 0 <= high:
        return "0.55"
    return "tab:blue" if high < 0 else "tab:orange"


def _by_budget(budgets: Sequence[Mapping[str, Any]]) -> Drawing:
    title = "Joint plan less every other plan, by budget"
    figure = Figure(figsize=(7.4, 4.4), dpi=100, layout="constrained")
    axes, rows = figure.add_subplot(), []
    for name in (*_DRAWN, DENSE):
        # A random plan has another seed at every budget, and greedy plans exist at the first one only.
        own = [(budget, one) for budget in budgets for one in budget["joint_less"] if one["against"] == name]
        own.sort(key=lambda pair: pair[0]["share"])
        if not own:
            continue
        x, y = [budget["share"] for budget, _ in own], [one["difference"] for _, one in own]
        # A percentile interval need not contain the mean.
        ends = [one["interval"] for _, one in own]
        reach = [
            [max(0.0, b - low) for b, (low, _) in zip(y, ends, strict=True)],
            [max(0.0, high - b) for b, (_, high) in zip(y, ends, strict=True)],
        ]
        axes.errorbar(x, y, reach, fmt="o-", ms=4, lw=1.2, capsize=2, color=_COLOURS[name], label=name)
        rows += [
            (name, budget["budget"], f"{one['difference']:+.6f}", *(f"{end:+.6f}" for end in one["interval"]))
            for budget, one in own
        ]
    axes.axhline(0.0, color="0.3", lw=0.8)
    _symmetric_log(axes, "y", [one["difference"] for budget in budgets for one in budget["joint_less"]])
    axes.set_xlabel("budget as a share of the dense model's cost")
    axes.set_ylabel("difference of the loss, nats per token")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return Drawing(title, figure, [Table(title, ("plan", "budget", "difference", "interval from", "to"), rows)])


def _symmetric_log(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Give one axis a scale that is logarithmic away from 0: differences span orders of magnitude."""
    sizes = np.abs([value for value in values if value])
    if not len(sizes) or sizes.max() <= 10 * np.median(sizes):
        return
    # A whole decade: otherwise the tick labels around 0 overlap.
    settings: dict[str, Any] = {"linthresh": float(10.0 ** np.floor(np.log10(np.median(sizes))))}
    axes.set_xscale("symlog", **settings) if which == "x" else axes.set_yscale("symlog", **settings)
