"""Compare plans of the same cost on held-out sequences: the loss with its interval, and the measured cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qsparse_moe.ablation.allocation.allocate import allocate_for, uniform_at
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.allocation.defaults import NUM_RANDOM, ROUNDS
from qsparse_moe.ablation.allocation.rivals import greedy_plan, random_plan
from qsparse_moe.ablation.routing import with_all_ranks
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, bootstrap_intervals, loss_by_document
from qsparse_moe.data.packing import Array
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

ALLOCATED, UNIFORM, GREEDY, DENSE = "allocated", "uniform", "greedy by layer", "dense"


@dataclass(frozen=True)
class PlanComparison:
    """The result of one plan on the held-out sequences."""

    name: str
    loss: float
    """Loss in nats per token."""
    against_uniform: float
    """Difference between its loss and the loss under uniform S, or under the plan that stands for it."""
    interval: tuple[float, float]
    """95 % bootstrap interval of that difference, over documents."""
    cost: float
    """Cost in the unit of the budget, under the expert load measured on the held-out sequences with this plan."""
    gap_closed: float | None
    """Share of the gap between uniform S and the dense model; None if the interval of that gap contains 0."""


def rival_plans(
    model: Transformer,
    sequences: DocumentSequences,
    costs: Costs,
    target: float,
    *,
    num_random: int = NUM_RANDOM,
    rounds: int = ROUNDS,
) -> dict[str, SparsityPlan]:
    """Return all plans of one budget by name. The plan of the model is the same after the call.

    Raises:
        ConfigError: no plan meets the budget.
    """
    uniform = uniform_at(model.sparsity_plan, costs, target)
    plans = {
        ALLOCATED: allocate_for(model, sequences, costs, target, rounds=rounds),
        UNIFORM: uniform,
        GREEDY: greedy_plan(model, sequences, uniform, costs, target),
    }
    return plans | {f"random {seed}": random_plan(uniform, costs, target, seed) for seed in range(num_random)}


def load_under_uniform(
    model: Transformer, sequences: DocumentSequences, costs: Costs, target: float, *, rounds: int = 2
) -> Costs:
    """Return ``costs`` with the expert load under uniform S at the budget.

    Uniform S at the budget itself depends slightly on the load, hence the rounds.
    """
    before = model.sparsity_plan
    try:
        for _ in range(rounds):
            costs = replace(costs, load=measured_load(model, sequences))
            model.set_sparsity(uniform_at(before, costs, target))
        return costs
    finally:
        model.set_sparsity(before)


def compare(
    model: Transformer, sequences: DocumentSequences, plans: Mapping[str, SparsityPlan], costs: Costs
) -> tuple[PlanComparison, ...]:
    """Compare every plan and the dense model on held-out sequences; uniform S must be among the plans."""
    dense = with_all_ranks(SparsityPlan.uniform(model.config, 0.0))
    return comparisons(evaluated(model, sequences, {**plans, DENSE: dense}, costs), sequences.labels_C)


def evaluated(
    model: Transformer, sequences: DocumentSequences, plans: Mapping[str, SparsityPlan], costs: Costs
) -> dict[str, tuple[Array, float]]:
    """Return the loss per document and the cost of every plan, under the expert load that the plan itself has there.

    The plan of the model is the same after the call.
    """
    before = model.sparsity_plan
    found: dict[str, tuple[Array, float]] = {}
    try:
        for name, plan in plans.items():
            model.set_sparsity(plan)
            losses_C = loss_by_document(model, sequences)
            # The load depends on the plan, because sparser layers route other tokens to an expert.
            found[name] = losses_C, replace(costs, load=measured_load(model, sequences), loads={}).of(plan)
        return found
    finally:
        model.set_sparsity(before)


@dataclass(frozen=True)
class Difference:
    """The loss of one plan less that of another on the held-out sequences, in nats per token."""

    plan: str
    against: str
    difference: float
    interval: tuple[float, float]
    """95 % bootstrap interval over documents, of differences within a document."""


def differences(found: Mapping[str, tuple[Array, float]], plan: str, labels_C: Array) -> tuple[Difference, ...]:
    """Return the differences between ``plan`` and every other one."""
    others = [name for name in found if name != plan]
    differences_XC = np.stack([found[plan][0] - found[name][0] for name in others])
    low, high = bootstrap_intervals(differences_XC, labels_C)
    return tuple(
        Difference(plan, name, float(differences_XC[i].sum() / labels_C.sum()), (float(low[i]), float(high[i])))
        for i, name in enumerate(others)
    )


def comparisons(
    found: Mapping[str, tuple[Array, float]], labels_C: Array, *, against: str = UNIFORM
) -> tuple[PlanComparison, ...]:
    """Return the comparison from the loss per document and the cost of each; dense must be among them.

    ``against`` names the plan that all are compared with and that the gap to dense is measured from.
    """
    uniform_C, dense_C = found[against][0], found[DENSE][0]
    gap = float((uniform_C - dense_C).sum())
    differences_XC = np.stack([losses_C - uniform_C for losses_C, _ in found.values()])
    # Of differences within a document, whose variance is far below that of the losses.
    low, high = bootstrap_intervals(differences_XC, labels_C)
    # If the gap may be 0 or negative, a ratio over it has no meaning.
    has_gap = bool(high[list(found).index(DENSE)] < 0)
    return tuple(
        PlanComparison(
            name=name,
            loss=float(losses_C.sum() / labels_C.sum()),
            against_uniform=float(differences_XC[i].sum() / labels_C.sum()),
            interval=(float(low[i]), float(high[i])),
            cost=cost,
            gap_closed=float(-differences_XC[i].sum() / gap) if has_gap else None,
        )
        for i, (name, (losses_C, cost)) in enumerate(found.items())
    )
