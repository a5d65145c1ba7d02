"""What to run after an allocation: train and evaluate with the plan, decode with it, and allocate again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.allocation.budget import Budget, parse_budget
from qsparse_moe.ablation.page.commands import PROGRAM, config_of, run_of
from qsparse_moe.ablation.page.parts import Command
from qsparse_moe.config.overrides import override_of

_FRONT = "0.3:0.9:0.1"
_STEP = 0.1


def next_commands(content: Mapping[str, Any]) -> list[Command]:
    """Return the commands that continue from the JSON of an allocation."""
    model, plan = Path(content["run_dir"]), content["output"]
    name = f"{run_of(model).name or 'run'}-{Path(plan).stem}"
    begin = [PROGRAM, "train", str(config_of(model)), override_of("training.name", name)]
    begin += [override_of("training.init_from", str(model)), *content["settings"]]
    return [
        Command("Continue training with the plan, from the weights of this model", begin),
        Command("Loss under the plan", [PROGRAM, "evaluate", str(model), "--plan", plan]),
        Command(
            "What the plan changes beside the loss, against the dense model",
            [PROGRAM, "evaluate", str(model), "--plan", plan, "--compare", "dense"],
        ),
        Command(
            "Decode with the plan",
            [PROGRAM, "generate", str(model), "--plan", plan, "--prompt", "def ", "--stats"],
        ),
        *(_budgets(content, model, Path(plan)) if "budgets" in content else ()),
    ]


def _budgets(content: Mapping[str, Any], model: Path, plan: Path) -> list[Command]:
    """Return an allocation at the next smaller budget, and the front if there is none yet."""
    # By the share: of a front, the first budget may be a cost and the others are shares.
    least = parse_budget(min(content["budgets"], key=lambda budget: budget["share"])["budget"])
    make = Budget if least.is_share else Budget.of_cost
    smaller = make(least.quantity, _smaller(least), least.batch)
    found = [Command("The next smaller budget", _allocate(model, plan, smaller.name, smaller))]
    # A front is made of shares of the dense model's cost.
    if len(content["budgets"]) == 1 and least.is_share:
        front = [*_allocate(model, plan, "front", least), "--front", _FRONT, "--decode"]
        found.append(Command("The front of budgets, with the measured time of decoding", front))
    return found


def _allocate(model: Path, plan: Path, name: str, budget: Budget) -> list[str]:
    # The default folder would replace this report.
    output, folder = plan.with_name(f"{plan.stem}-{name}{plan.suffix}"), run_of(model) / f"allocation-{name}"
    given = ["--budget", budget.text, "--output", str(output), "--folder", str(folder)]
    return [PROGRAM, "allocate", str(model), *given]


def _smaller(budget: Budget) -> float:
    """Return the next smaller value: a tenth of the dense model less, or half if that would be nothing."""
    value = budget.value
    if not budget.is_share:
        return float(f"{0.9 * value:.6g}")
    return round(value - _STEP, 10) if value > 1.5 * _STEP else value / 2
