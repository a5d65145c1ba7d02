"""Write joint allocations as JSON, Markdown, and figures of the front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from qsparse_moe.ablation.allocation.compare import GREEDY, UNIFORM
from qsparse_moe.ablation.allocation.front_figures import UNITS
from qsparse_moe.ablation.allocation.joint_plans import A_ALONE, JOINT, S_ALONE, UNIFORM_BOTH
from qsparse_moe.ablation.allocation.joint_run import BudgetResult, JointAllocation
from qsparse_moe.ablation.allocation.report import NO_GAP
from qsparse_moe.ablation.allocation.spent import LossSpent
from qsparse_moe.ablation.page.parts import Drawing
from qsparse_moe.ablation.sensitivity.report import table
from qsparse_moe.errors import naming
from qsparse_moe.metrics.tensorboard import plan_table
from qsparse_moe.sparsity.plan import SparsityPlan

FORMAT = "qsparse_moe.allocation/2"
HEAD = ("plan", "loss", "against uniform", "joint less this plan", "95 % interval", "measured cost", "gap closed")
"""The columns of ``joint_rows``."""
DECODE_HEAD = ("plan", "tokens per second", "ms per step", "predicted ms", "bytes read per step")
"""The columns of ``decode_rows``."""
_KEPT = (JOINT, S_ALONE, A_ALONE, UNIFORM, UNIFORM_BOTH, GREEDY)


def as_dict(found: JointAllocation, *, run_dir: Path, output: Path) -> dict[str, Any]:
    """Return everything as values that JSON can hold. The keys are public and do not follow renamings."""
    first = found.results[0].budget
    return {
        "format": FORMAT,
        "run_dir": str(run_dir),
        "output": str(output),
        "quantity": first.quantity,
        "batch": first.batch,
        "step": found.step,
        "rows": found.num_sequences,
        "held_out_rows": found.num_held_out,
        "train_steps": found.train_steps,
        "dense": {"cost": found.dense_cost, "loss": found.dense_loss},
        "budgets": [_budget(result, found.dense_cost) for result in found.results],
    }


def _budget(result: BudgetResult, dense_cost: float) -> dict[str, Any]:
    return {
        "budget": result.budget.text,
        "share": result.target / dense_cost,
        "target": result.target,
        "outcomes": [asdict(one) for one in result.comparisons],
        "joint_less": [asdict(one) for one in result.differences],
        "decoding": {
            name: asdict(one) | {"predicted_milliseconds": result.predicted.get(name)}
            for name, one in result.decoding.items()
        },
        "after_training": [asdict(one) for one in result.after_training],
        "joint_less_after_training": [asdict(one) for one in result.differences_after_training],
        "left_out": dict(result.left_out),
        "spent": _spent(result.spent),
        "plans": {name: json.loads(plan.to_json()) for name, plan in result.plans.items() if name in _KEPT},
    }


def _spent(found: LossSpent) -> dict[str, Any]:
    return {
        "estimated": found.parts.total,
        "evaluated": found.evaluated,
        "routing_evaluated": True,
        "cells": [{**cell._asdict(), "change": change} for cell, change in found.parts.cells.items()],
        "routing": [{"layer": layer, "change": change} for layer, change in found.parts.routing.items()],
    }


def markdown(found: JointAllocation, *, title: str, figures: Sequence[str] = ()) -> str:
    """Return the comparisons of every budget, and the joint plan of the first."""
    first = found.results[0]
    parts = [
        f"# {title}",
        f"Checkpoint of step {found.step}; {found.num_sequences} training sequences for the plans, "
        f"{found.num_held_out} validation sequences for the comparison. The dense model with all its experts per token "
        f"costs {found.dense_cost:,.6g} {UNITS[first.budget.quantity]} and has a loss of {found.dense_loss:.4f} nats "
        "per token. Costs are shares of the dense model's, measured on the validation sequences. Intervals are those "
        "of the difference, by bootstrap over documents.",
    ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in figures]
    for result in found.results:
        budget = _budget(result, found.dense_cost)
        parts += [
            f"## {result.budget.text}",
            table(HEAD, joint_rows(budget, found.dense_cost)),
        ]
        parts += [f"No plan *{name}*: {reason}." for name, reason in result.left_out.items()]
        if result.decoding:
            parts += ["Decoding of held-out text with the engine native:", table(DECODE_HEAD, decode_rows(budget))]
        if result.after_training:
            parts.append(f"After {found.train_steps} steps of training with each plan:")
            parts.append(table(HEAD, joint_rows(budget, found.dense_cost, after_training=True)))
    parts += ["Experts per token of the first joint plan:", routing_table(first.plans[JOINT])]
    return "\n\n".join([*parts, "S of the first joint plan:", plan_table(first.plans[JOINT])]) + "\n"


def joint_rows(budget: Mapping[str, Any], dense_cost: float, *, after_training: bool = False) -> list[tuple[str, ...]]:
    """Return the rows of one budget of ``as_dict`` as text, in the order of ``HEAD``."""
    names = ("after_training", "joint_less_after_training") if after_training else ("outcomes", "joint_less")
    less = {one["against"]: one for one in budget[names[1]]}
    return [
        (
            one["name"],
            f"{one['loss']:.4f}",
            f"{one['against_uniform']:+.4f}",
            f"{less[one['name']]['difference']:+.4f}" if one["name"] in less else "",
            "{:+.4f} to {:+.4f}".format(*less[one["name"]]["interval"]) if one["name"] in less else "",
            f"{one['cost'] / dense_cost:.3f}",
            NO_GAP if one["gap_closed"] is None else f"{one['gap_closed']:.2f}",
        )
        for one in budget[names[0]]
    ]


def decode_rows(budget: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the decoding of one budget of ``as_dict`` as text, in the order of ``DECODE_HEAD``."""
    return [
        (
            name,
            f"{one['tokens_per_second']:,.0f}",
            f"{one['milliseconds']:.3f}",
            "" if one["predicted_milliseconds"] is None else f"{one['predicted_milliseconds']:.3f}",
            f"{one['bytes_read']:,.0f}",
        )
        for name, one in budget["decoding"].items()
    ]


def routing_table(plan: SparsityPlan) -> str:
    """Return the experts per token by layer as a Markdown table."""
    layers = sorted(plan.experts_per_token)
    return table(
        ("layer", "experts per token, at most", "share of the router weight"),
        [(str(one), str(plan.experts_per_token[one]), f"{plan.top_p.get(one, 1.0):g}") for one in layers],
    )


def write_plans(result: BudgetResult, folder: Path) -> list[Path]:
    """Write every plan of a budget that is not random to a file of its own; return the files.

    Args:
        result: the plans of one budget.
        folder: an existing folder, for files such as ``bytes-0.5-joint.json``.
    """
    found = []
    for name, plan in result.plans.items():
        if name in _KEPT:
            found.append(folder / f"{result.budget.name}-{name.replace(' ', '-')}.json")
            plan.save(found[-1])
    return found


def write_fronts(drawings: Mapping[str, Drawing], folder: Path) -> list[Path]:
    """Write the figures of a front among ``drawings`` as PNG files, and return the files."""
    files = []
    for name in ("front", "front-decoding"):
        if name in drawings:
            file = folder / f"{name}.png"
            with naming(file):
                FigureCanvasAgg(drawings[name].figure).print_png(str(file))
            files.append(file)
    return files
