"""Plans of the same cost on held-out rows: loss with its interval, and the cost that was measured there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qsparse_moe.ablation.allocation.allocate import allocate_for, uniform_at
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.allocation.rivals import greedy_plan, random_plan
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, bootstrap_intervals, loss_by_document
from qsparse_moe.data.packing import Array
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

ALLOCATED, UNIFORM, GREEDY, DENSE = "allocated", "uniform", "greedy by layer", "dense"


@dataclass(frozen=True)
class PlanComparison:
    """One way to spend the budget, on the held-out rows."""

    name: str
    loss: float
    """Nats a token."""
    against_uniform: float
    """Difference of the loss to uniform S."""
    interval: tuple[float, float]
    """Of that difference, 95 % by bootstrap over documents."""
    cost: float
    """In the unit of the budget, with the load that was measured on the held-out rows under this very plan."""
    gap_closed: float | None
    """Share of the distance from uniform S to the dense model; None where the interval of that distance holds 0."""


def rival_plans(
    model: Transformer,
    sequences: DocumentSequences,
    costs: Costs,
    target: float,
    *,
    num_random: int = 5,
    rounds: int = 3,
) -> dict[str, SparsityPlan]:
    """All plans of one budget by name, made from the rows of the sensitivities; the model keeps its plan.

    Raises:
        ConfigError: no plan keeps to the budget.
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
    """``costs`` with the load that the rows have under uniform S at the budget, which depends on that load a little."""
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
    """Every plan, and the dense model, on rows that no plan was made from; uniform S must be among the plans."""
    before = model.sparsity_plan
    found: dict[str, tuple[Array, float]] = {}
    try:
        for name, plan in ({**plans, DENSE: SparsityPlan.uniform(model.config, 0.0)}).items():
            model.set_sparsity(plan)
            losses_C = loss_by_document(model, sequences)
            found[name] = losses_C, replace(costs, load=measured_load(model, sequences)).of(plan)
    finally:
        model.set_sparsity(before)
    return comparisons(found, sequences.labels_C)


def comparisons(found: Mapping[str, tuple[Array, float]], labels_C: Array) -> tuple[PlanComparison, ...]:
    """From the losses by document and the measured cost of each; uniform S and the dense model are among them."""
    uniform_C, dense_C = found[UNIFORM][0], found[DENSE][0]
    gap = float((uniform_C - dense_C).sum())
    apart = np.stack([losses_C - uniform_C for losses_C, _ in found.values()])
    low, high = bootstrap_intervals(apart, labels_C)
    # A ratio over a distance that may be 0, or of the other sign, says nothing.
    is_told = bool(high[list(found).index(DENSE)] < 0)
    return tuple(
        PlanComparison(
            name=name,
            loss=float(losses_C.sum() / labels_C.sum()),
            against_uniform=float(apart[i].sum() / labels_C.sum()),
            interval=(float(low[i]), float(high[i])),
            cost=cost,
            gap_closed=float(-apart[i].sum() / gap) if is_told else None,
        )
        for i, (name, (losses_C, cost)) in enumerate(found.items())
    )
