"""Budgets that no plan meets: each is refused with the least that one meets, as options that can be typed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qsparse_moe.ablation.allocation.budget import Budget
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.routing import Choice, choices_of, with_choices
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan

MOST_SPARSE = 0.95
"""The largest S that a plan may have."""
# The sum of a measured load differs from the number of experts by rounding in fp32, and the cost with it.
_ROUNDING = 1e-6
# Every call measures the times again: three calls on a busy machine predicted 0.045, 0.051, and 0.049 ms.
_MEASURED_AGAIN = 1.25
_NEEDED = {
    "parameters": "needs {} parameters per token",
    "flops": "takes {} FLOPs per token",
    "bytes": "reads up to {} bytes per step",
    "ms": "takes {} ms per step, predicted",
}


class OutOfReach(ConfigError):
    """No plan meets a budget."""


def everywhere(plan: SparsityPlan, config: ModelConfig, choice: Choice) -> SparsityPlan:
    """Return ``plan`` with one choice in all MoE layers."""
    return with_choices(plan, dict.fromkeys(moe_layers(config), choice))


def is_within(costs: Costs, plan: SparsityPlan, target: float) -> bool:
    """Return whether the cost of ``plan`` is at most ``target``; of a mean S, at least."""
    # The tolerance lets a budget through that was computed from the sparsest plan itself.
    return costs.total_at(costs.of(plan)) <= costs.total_at(target) * (1 + 1e-9)


def check_budget(costs: Costs, least: SparsityPlan, target: float) -> None:
    """Raise OutOfReach if even ``least``, the sparsest plan of S alone, exceeds the budget."""
    if is_within(costs, least, target):
        return
    limit = f"{MOST_SPARSE:g} at every site"
    if costs.quantity == "sparsity":
        # Down, because a larger S would be refused again.
        mean = math.floor((costs.of(least) - _ROUNDING) * 1e4) / 1e4
        raise OutOfReach(
            f"--sparsity ({target:.15g}) cannot be met: an S of {limit} is a mean S of {costs.of(least):.4f}; ask for "
            f"--sparsity {mean:.4f} or less"
        )
    own = replace(costs, load=_even_load(least, costs.config), loads={})
    needed = _rounded_up(own.of(least), costs)
    # The plan of the model with S = 0: what the budgets of S alone begin at.
    whole = own.of(replace(least, values={place: (0.0,) * len(each) for place, each in least.values.items()}))
    options = f"--{costs.quantity} {needed}" + (f" --batch {costs.batch}" if costs.quantity == "bytes" else "")
    raise OutOfReach(
        f"--{costs.quantity} ({target:.15g}) cannot be met: with S = {limit}, the model still "
        f"{_NEEDED[costs.quantity].format(needed)}; ask for {options} or more, which is "
        f"{_share(float(needed) / whole)} of its cost at S = 0"
    )


def check_reachable(
    costs: Costs, dense: SparsityPlan, budget: Budget, choices: Sequence[Choice], *, is_of_front: bool = False
) -> None:
    """Raise OutOfReach if the cheapest choice exceeds the budget, at S = 0 as well as at the largest S.

    Args:
        costs: the costs with the load of the dense model under every choice.
        dense: the dense model with all ranks.
        budget: a budget of the quantity of ``costs``.
        choices: the choices of ranks that a plan may have.
        is_of_front: whether the budget is one of ``--front``, for the message.
    """
    sparsest = replace(dense, values={place: (MOST_SPARSE,) * len(own) for place, own in dense.values.items()})
    ends = {
        (choice, sparsity): everywhere(plan, costs.config, choice)
        for sparsity, plan in ((MOST_SPARSE, sparsest), (0.0, dense))
        for choice in choices
    }
    choice, sparsity = min(ends, key=lambda end: costs.of(ends[end]))
    whole, least = costs.of(dense), ends[choice, sparsity]
    if is_within(costs, least, budget.target(whole)):
        return
    nearest = _nearest(costs, least)
    share = _share(nearest.value / whole)
    again = " (a quarter above it, because every call measures the times again)" if costs.quantity == "ms" else ""
    way = f'ask for --budget "{nearest.text}" or more{again}, which is {share} of the dense model\'s cost'
    raise OutOfReach(
        f"{'--front' if is_of_front else '--budget'} ({budget.text}) cannot be met: {_experts_text(choice)} and with "
        f"S = {sparsity:g} at every other site, the model still "
        f"{_NEEDED[costs.quantity].format(_rounded_up(costs.of(least), costs))}; "
        + (f"begin at {share} or more{again}" if is_of_front else way)
    )


def _nearest(costs: Costs, least: SparsityPlan) -> Budget:
    margin = _MEASURED_AGAIN if costs.quantity == "ms" else 1.0
    return Budget.of_cost(costs.quantity, float(_rounded_up(margin * costs.of(least), costs)), costs.batch)


def _rounded_up(cost: float, costs: Costs) -> str:
    """Return a cost without separators of thousands: a count as a whole number, a time with four digits."""
    if costs.quantity != "ms":
        return str(math.ceil(cost * (1 + _ROUNDING)))
    unit = 10.0 ** (math.floor(math.log10(cost)) - 3) if cost > 0 else 1.0
    return f"{math.ceil(cost / unit) * unit:.4g}"


def _share(share: float) -> str:
    return f"{math.ceil(share * 1e4) / 1e4:.4f}"


def _even_load(plan: SparsityPlan, config: ModelConfig) -> dict[int, tuple[float, ...]]:
    """Return the load under which no step reads more: tokens share the fewest rows if all experts have equally many.

    The load under the plan itself is known only after another measurement.
    """
    choices, number = choices_of(plan, config), config.moe.num_experts
    return {layer: (choice.experts / number,) * number for layer, choice in choices.items()}


def _experts_text(choice: Choice) -> str:
    if choice.experts == 0:
        return "without routed experts"
    share = f" that reach {choice.top_p:g} of the router weight" if choice.top_p < 1.0 else ""
    return f"with {choice.experts} expert{'s' if choice.experts > 1 else ''} per token{share}"
