"""An allocation as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.allocation.run import Allocation
from qsparse_moe.ablation.sensitivity.report import table
from qsparse_moe.metrics.tensorboard import plan_table

FORMAT = "qsparse_moe.allocation/1"
_HEAD = ("plan", "loss", "against uniform", "95 % interval", "cost measured", "gap closed")

GAP_NOT_TOLD = "gap not told from 0"


def as_dict(found: Allocation, *, run_dir: Path, output: Path) -> dict[str, Any]:
    """All but the plan, which has a file of its own; JSON-able."""
    return {
        "format": FORMAT,
        "run_dir": str(run_dir),
        "output": str(output),
        "quantity": found.quantity,
        "target": found.target,
        "planned": found.planned,
        "step": found.step,
        "rows": found.num_sequences,
        "held_out_rows": found.num_held_out,
        "train_steps": found.train_steps,
        "outcomes": [asdict(one) for one in found.comparisons],
        "alternatives": [asdict(one) for one in found.alternatives],
        "after_training": [asdict(one) for one in found.after_training],
    }


def markdown(found: Allocation, *, title: str) -> str:
    """The comparison, what training made of it, and the plan."""
    parts = [
        f"# {title}",
        f"Budget: {found.quantity} {found.target:,.6g}; the plan comes to {found.planned:,.6g} with the load of the "
        f"rows that it was made from. After step {found.step}; {found.num_sequences} training rows for the plans, "
        f"{found.num_held_out} validation rows for the figures. Losses in nats a token; the interval is that of the "
        "difference, by bootstrap over documents.",
        table(_HEAD, comparison_rows([asdict(one) for one in (*found.comparisons, *found.alternatives)])),
    ]
    if found.after_training:
        parts += [f"After {found.train_steps} steps of training with each plan:"]
        parts += [table(_HEAD, comparison_rows([asdict(one) for one in found.after_training]))]
    return "\n\n".join([*parts, "S of the plan:", plan_table(found.plan)]) + "\n"


def comparison_rows(comparisons: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The columns of a comparison as text."""
    return [
        (
            one["name"],
            f"{one['loss']:.4f}",
            f"{one['against_uniform']:+.4f}",
            f"{one['interval'][0]:+.4f} to {one['interval'][1]:+.4f}",
            f"{one['cost']:,.5g}",
            GAP_NOT_TOLD if one["gap_closed"] is None else f"{one['gap_closed']:.2f}",
        )
        for one in comparisons
    ]
