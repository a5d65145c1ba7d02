"""Write an allocation as JSON and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.allocation.run import Allocation
from qsparse_moe.ablation.sensitivity.report import table
from qsparse_moe.metrics.tensorboard import plan_table

FORMAT = "qsparse_moe.allocation/1"
HEAD = ("plan", "loss", "against uniform", "95 % interval", "measured cost", "gap closed")
"""The columns of ``comparison_rows``."""
NO_GAP = "gap not distinguishable from 0"


def as_dict(found: Allocation, *, run_dir: Path, output: Path) -> dict[str, Any]:
    """Return everything but the plan as values that JSON can hold. The keys are public and do not follow renamings."""
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
    """Return the comparisons before and after training, and the plan."""
    parts = [
        f"# {title}",
        f"Budget: {found.quantity} {found.target:,.6g}; the plan costs {found.planned:,.6g} under the expert load of "
        f"the sequences that it was made from. Checkpoint of step {found.step}; {found.num_sequences} training "
        f"sequences for the plans, {found.num_held_out} validation sequences for the comparison. Losses are in nats "
        "per token; the interval is that of the difference, by bootstrap over documents.",
        table(HEAD, comparison_rows([asdict(one) for one in (*found.comparisons, *found.alternatives)])),
    ]
    if found.after_training:
        parts += [f"After {found.train_steps} steps of training with each plan:"]
        parts += [table(HEAD, comparison_rows([asdict(one) for one in found.after_training]))]
    return "\n\n".join([*parts, "S of the plan:", plan_table(found.plan)]) + "\n"


def comparison_rows(comparisons: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows of a comparison table as text, in the order of ``HEAD``."""
    return [
        (
            one["name"],
            f"{one['loss']:.4f}",
            f"{one['against_uniform']:+.4f}",
            f"{one['interval'][0]:+.4f} to {one['interval'][1]:+.4f}",
            f"{one['cost']:,.5g}",
            NO_GAP if one["gap_closed"] is None else f"{one['gap_closed']:.2f}",
        )
        for one in comparisons
    ]
