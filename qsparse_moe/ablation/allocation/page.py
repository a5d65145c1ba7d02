"""The page of an allocation, made from the content of ``allocation.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qsparse_moe.ablation.allocation.budget import parse_budget
from qsparse_moe.ablation.allocation.budget_figures import against_dense, budget_drawings, joint_plan
from qsparse_moe.ablation.allocation.commands import next_commands
from qsparse_moe.ablation.allocation.compare import UNIFORM
from qsparse_moe.ablation.allocation.front_figures import UNITS, difference_drawings, front_drawings, methods
from qsparse_moe.ablation.allocation.joint_report import DECODE_HEAD, decode_rows, joint_rows
from qsparse_moe.ablation.allocation.joint_report import HEAD as JOINT_HEAD
from qsparse_moe.ablation.allocation.plan_figures import plan_drawings
from qsparse_moe.ablation.allocation.report import HEAD, comparison_rows
from qsparse_moe.ablation.allocation.spent_figures import spent_drawings
from qsparse_moe.ablation.page.parts import Drawing, Folded, Page, Part, Section, Table
from qsparse_moe.sparsity.plan import SparsityPlan

_INTERVALS = (
    "Losses are in nats per token on held-out sequences. Intervals are 95 %, by bootstrap over documents. Costs are "
    "measured on the held-out sequences, as shares of the dense model's."
)
_ADDED = "What the joint plan adds to the loss of the dense model on the held-out sequences."
_SPENT = (
    "The estimate of a whole plan is divided among its cells and choices of ranks; an interaction of two changes is "
    "divided equally between them, so that the parts add up to the estimate. A negative part lowers the loss."
)
_ROUTING_EVALUATED = "What the experts per token of a layer change alone is evaluated."
_ROUTING_ESTIMATED = (
    "What the experts per token of a layer change alone is estimated here, which puts a large change, such as that of "
    "a layer without experts, at about a tenth; a new allocation evaluates it."
)
_NOT_RECORDED = (
    "Where the estimate is not recorded, how the loss divides among layers, sites, and experts was not measured, and "
    "cannot be computed from what this report stores; a new allocation measures it."
)
_SPENT_HEAD = ("budget", "evaluated", "95 % interval", "estimated")
_SPENT_FIGURES = ("loss-by-layer", "loss-by-cell")


def allocation_drawings(content: Mapping[str, Any]) -> dict[str, Drawing]:
    """Return all figures of an allocation of both sparsities by name: those of the page, and of TensorBoard.

    The names of the figures of one plan end with its budget, such as ``plan-bytes-0.5``.
    """
    budgets = _ascending(content)
    found = {**front_drawings(content), **difference_drawings(content), **budget_drawings(budgets)}
    for budget in budgets:
        text = budget["budget"]
        own = plan_drawings(joint_plan(budget), text)
        if budget.get("spent"):
            own.update(spent_drawings(budget["spent"], text))
        found.update({f"{name}{_ending(budget)}": drawing for name, drawing in own.items()})
    return found


def allocation_page(content: Mapping[str, Any], drawings: Mapping[str, Drawing] | None = None) -> Page:
    """Return the page of an allocation of both sparsities.

    Args:
        content: what ``allocation.json`` holds.
        drawings: the result of ``allocation_drawings`` if it is at hand.
    """
    own = drawings or allocation_drawings(content)
    return Page(
        title=f"Joint plans for {content['run_dir']}",
        facts=_facts(content),
        sections=[
            Section("Front", [_INTERVALS, *_named(own, "front", "front-decoding")]),
            Section("Every plan beside the joint one", _comparisons(content, own)),
            Section("The plan" if len(content["budgets"]) == 1 else "The plans", _plans(content, own)),
            Section("Where the loss is spent", _spent(content, own)),
            Section("What to run next", [_FOLDER, *next_commands(content)]),
        ],
    )


_FOLDER = "Paths are relative to the folder in which this report was made."


def sparsity_drawings(content: Mapping[str, Any], plan: SparsityPlan) -> dict[str, Drawing]:
    """Return all figures of an allocation of S alone by name, from its JSON and its plan."""
    outcomes = [*content["outcomes"], *content["alternatives"]]
    found = {"methods": _against_uniform("Every plan less uniform S", outcomes)}
    if content["after_training"]:
        title = f"Every plan less uniform S, after {content['train_steps']} steps of training"
        found["methods-after-training"] = _against_uniform(title, content["after_training"])
    return {**found, **plan_drawings(plan)}


def sparsity_page(content: Mapping[str, Any], drawings: Mapping[str, Drawing]) -> Page:
    """Return the page of an allocation of S alone from its JSON and the result of ``sparsity_drawings``."""
    beside: list[Part] = [
        "Losses are in nats per token on held-out sequences, with 95 % intervals by bootstrap over documents.",
        drawings["methods"],
        Table("Without training", HEAD, _comparison_rows(content, "outcomes", "alternatives")),
    ]
    if content["after_training"]:
        title = f"After {content['train_steps']} steps of training with each plan"
        beside.append(drawings["methods-after-training"])
        beside.append(Table(title, HEAD, _comparison_rows(content, "after_training")))
    facts = [
        ("budget", f"{content['quantity']} {_number(content['target'])}"),
        ("planned", _number(content["planned"])),
        *_counts(content),
    ]
    return Page(
        title=f"Plans for {content['run_dir']}",
        facts=facts,
        sections=[
            Section("Every plan beside uniform S", beside),
            Section("The plan", [f"The plan in {content['output']}.", drawings["plan"]]),
            Section("What to run next", [_FOLDER, *next_commands(content)]),
        ],
    )


def _comparison_rows(content: Mapping[str, Any], *names: str) -> list[tuple[str, ...]]:
    return comparison_rows([one for name in names for one in content[name]])


def _against_uniform(title: str, outcomes: Sequence[Mapping[str, Any]]) -> Drawing:
    shown = [
        {"against": one["name"], "difference": one["against_uniform"], "interval": one["interval"]}
        for one in outcomes
        if one["name"] != UNIFORM
    ]
    return methods(title, shown)


def _ascending(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(content["budgets"], key=lambda budget: budget["share"])


def _ending(budget: Mapping[str, Any]) -> str:
    return f"-{parse_budget(budget['budget']).name}"


def _named(drawings: Mapping[str, Drawing], *names: str) -> list[Drawing]:
    return [drawings[name] for name in names if name in drawings]


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    dense = content["dense"]
    return [
        ("budget", content["budgets"][0]["budget"]),
        *_counts(content),
        ("dense model", f"{_number(dense['cost'])} {UNITS[content['quantity']]}, loss {dense['loss']:.4f}"),
    ]


def _number(value: float) -> str:
    """Return a cost for the page: FLOPs and bytes with all their digits, milliseconds with a few."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _counts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("step of the checkpoint", f"{content['step']:,}"),
        ("training sequences for the plans", _rows_text(content)),
        ("held-out sequences", f"{content['held_out_rows']:,}"),
    ]


def _rows_text(content: Mapping[str, Any]) -> str:
    """Return the number of training sequences; of reports that were put together, the least and the most."""
    found = {one.get("rows", content["rows"]) for one in content.get("budgets", ({},))}
    return " to ".join(f"{rows:,}" for rows in sorted({min(found), max(found)}))


def _comparisons(content: Mapping[str, Any], drawings: Mapping[str, Drawing]) -> list[Part]:
    first, *others = content["budgets"]
    parts: list[Part] = [*_named(drawings, "methods-by-budget", "methods"), *_tables(content, first)]
    parts += [*_named(drawings, "methods-after-training")]
    return parts + [Folded(budget["budget"], _tables(content, budget)) for budget in others]


def _tables(content: Mapping[str, Any], budget: Mapping[str, Any]) -> list[Part]:
    dense = content["dense"]["cost"]
    name = budget["budget"]
    parts: list[Part] = [Table(name, JOINT_HEAD, joint_rows(budget, dense))]
    parts += [f"No plan {left}: {reason}." for left, reason in budget["left_out"].items()]
    if budget["decoding"]:
        parts.append(Table(f"{name}: decoding with the engine native", DECODE_HEAD, decode_rows(budget)))
    if budget["after_training"]:
        title = f"{name}: after {content['train_steps']} steps of training with each plan"
        parts.append(Table(title, JOINT_HEAD, joint_rows(budget, dense, after_training=True)))
    return parts


def _plans(content: Mapping[str, Any], drawings: Mapping[str, Drawing]) -> list[Part]:
    """Return the plan of one budget, or an overview of several and each of them to unfold, the first one unfolded."""
    first = content["budgets"][0]
    told = f"The joint plan of {first['budget']} is in {content['output']}."
    if len(content["budgets"]) == 1:
        return [told, *_of_budget(drawings, first, "plan", "experts-per-token")]
    each = [
        Folded(f"Plan of {one['budget']}", _of_budget(drawings, one, "plan", "experts-per-token"), one is first)
        for one in _ascending(content)
    ]
    return [f"{told} Those of the other budgets are in this report's JSON.", drawings["plans-by-budget"], *each]


def _of_budget(drawings: Mapping[str, Drawing], budget: Mapping[str, Any], *names: str) -> list[Drawing]:
    return _named(drawings, *(f"{name}{_ending(budget)}" for name in names))


def _spent(content: Mapping[str, Any], drawings: Mapping[str, Drawing]) -> list[Part]:
    budgets = _ascending(content)
    recorded = [budget for budget in budgets if budget.get("spent")]
    parts: list[Part] = [
        _ADDED,
        Table("Loss that the joint plan adds, nats per token", _SPENT_HEAD, list(map(_spent_row, budgets))),
    ]
    if len(recorded) < len(budgets):
        parts.append(_NOT_RECORDED)
    if recorded:
        evaluated = all(budget["spent"].get("routing_evaluated") for budget in recorded)
        parts += [_SPENT, _ROUTING_EVALUATED if evaluated else _ROUTING_ESTIMATED]
        parts += [*_named(drawings, "loss-by-budget")]
    if len(budgets) == 1:
        return parts + [one for budget in recorded for one in _of_budget(drawings, budget, *_SPENT_FIGURES)]
    first = content["budgets"][0]
    return parts + [
        Folded(f"Loss spent at {one['budget']}", _of_budget(drawings, one, *_SPENT_FIGURES), one is first)
        for one in recorded
    ]


def _spent_row(budget: Mapping[str, Any]) -> tuple[str, ...]:
    evaluated, spent = against_dense(budget), budget.get("spent")
    low, high = evaluated["interval"]
    estimated = f"{spent['estimated']:+.4f}" if spent else "not recorded"
    return budget["budget"], f"{evaluated['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", estimated
