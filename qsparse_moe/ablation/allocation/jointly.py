"""Allocate both sparsities to a model in rounds: estimate around a plan, solve, move, and estimate again.

The estimate is that of a whole plan (``sensitivity/joint.py``). It is valid near the plan at which it was made, so in
every round the choice of a layer moves to its neighbours in cost only, and S of a cell by at most 0.25. The plan moves
half of the way or the whole way, whichever has the lower loss when it is evaluated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from qsparse_moe.ablation.allocation.allocate import FINE_VALUES, shifted
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.defaults import ROUNDS
from qsparse_moe.ablation.allocation.problem import Problem
from qsparse_moe.ablation.allocation.reach import OutOfReach
from qsparse_moe.ablation.cells import cells_of, sparsity_of
from qsparse_moe.ablation.routing import Choice
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, mean_loss
from qsparse_moe.ablation.sensitivity.joint import PlanTerms, plan_terms
from qsparse_moe.ablation.sensitivity.measured_routing import with_measured_routing
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

logger = logging.getLogger(__name__)

DRAWS = 2
"""Draws of labels per estimate: the interactions of many cells are noisier than the terms of one cell."""
# Without it, the solution of the first round had a loss of 1.31 where the plan it began at had 1.25 (docs/lab-log.md).
_RADIUS = 0.25
_PARTS = (1.0, 0.5)


class Texts(NamedTuple):
    """The sequences that plans are made from."""

    fit: DocumentSequences
    """Those that the estimates are made on."""
    judge: DocumentSequences
    """Others, on which plans are evaluated: on the sequences of its estimate a plan looks better than it is."""


Choices = Mapping[int, Sequence[Choice]]
"""The choices of ranks among which every MoE layer may choose."""


def best_of(model: Transformer, sequences: DocumentSequences, plans: Sequence[SparsityPlan]) -> SparsityPlan:
    """Return the plan with the least evaluated loss."""
    return min(plans, key=lambda plan: mean_loss(model, sequences, plan))


def allocate_jointly(
    model: Transformer,
    texts: Texts,
    costs: Costs,
    target: float,
    start: SparsityPlan,
    choices: Choices,
    *,
    rounds: int = ROUNDS,
) -> SparsityPlan:
    """Return the best plan of all rounds from ``start`` on, by the evaluated loss.

    Every plan meets the budget under the load of the plan before it; under its own load it has cost up to 1 % more.
    With a single choice per layer, that of ``start``, only S is allocated. The plan of the model is the same after the
    call.
    """
    here, best = start, (mean_loss(model, texts.judge, start), start)
    for number in range(rounds):
        # Other labels are drawn in every round, so that the rounds do not fit the noise of one draw.
        terms = terms_around(model, texts.fit, here, choices, seed=number)
        own = replace(costs, loads=terms.load)
        problem = Problem.of(terms, own, target, radius=_RADIUS)
        there = problem.plan_of(problem.solve())
        found = (_moved(here, there, part, own, target) for part in _PARTS)
        moved = [plan for plan in found if plan is not None]
        if not moved:
            # Near the least budget: here the load is more even than where the budget was checked, and costs more.
            logger.info("round %d of %d: no plan meets the budget under the load here", number + 1, rounds)
            break
        loss, here = min(((mean_loss(model, texts.judge, plan), plan) for plan in moved), key=lambda one: one[0])
        best = min(best, (loss, here), key=lambda one: one[0])
        # A round takes minutes, and a budget several of them.
        logger.info("round %d of %d: a loss of %.4f, the best so far is %.4f", number + 1, rounds, loss, best[0])
    return best[1]


def allocate_routing(
    model: Transformer,
    texts: Texts,
    costs: Costs,
    target: float,
    starts: Sequence[SparsityPlan],
    bases: Sequence[SparsityPlan],
    choices: Choices,
) -> SparsityPlan:
    """Return the best plan that changes the choices of ranks alone, by the evaluated loss.

    Its cost is below the budget by up to one choice of one layer, because S does not fill the rest. The plan of the
    model is the same after the call.

    Args:
        model: as in ``allocate_jointly``.
        texts: as in ``allocate_jointly``.
        costs: as in ``allocate_jointly``.
        target: as in ``allocate_jointly``.
        starts: plans within the budget, which are evaluated as well.
        bases: plans to estimate around, whatever they cost: no start may be near a good plan.
        choices: as in ``allocate_jointly``.
    """
    found = [*starts]
    for number, base in enumerate(bases):
        found += _solved_routing(model, texts, costs, target, base, choices, seed=number)
    best = best_of(model, texts.judge, found)
    again = _solved_routing(model, texts, costs, target, best, choices, seed=len(bases))
    return best_of(model, texts.judge, [best, *again])


def _solved_routing(
    model: Transformer,
    texts: Texts,
    costs: Costs,
    target: float,
    base: SparsityPlan,
    choices: Choices,
    *,
    seed: int,
) -> list[SparsityPlan]:
    """Return the plans with the best choices by two estimates around ``base``; none if no choices meet the budget.

    One estimate is that of the passes, the other has the evaluated change of every layer alone. Neither finds the
    better plan always: by the first, whole layers lost their experts where one expert less in several of them costs a
    fraction; the second takes the sum of large changes for the change of all (docs/lab-log.md, 29 November).
    """
    around = terms_around(model, texts.fit, base, choices, seed=seed)
    found = []
    for terms in (around, with_measured_routing(around, model, texts.fit)):
        problem = Problem.of(terms, replace(costs, loads=terms.load), target, radius=0.0)
        point = problem.routing_alone()
        if point.loss < float("inf"):
            found.append(problem.plan_of(point))
    return found


def terms_around(
    model: Transformer, sequences: DocumentSequences, plan: SparsityPlan, choices: Choices, *, seed: int = 0
) -> PlanTerms:
    """Return the terms around ``plan``. The plan of the model is the same after the call."""
    before = model.sparsity_plan
    try:
        model.set_sparsity(plan)
        return plan_terms(model, sequences, FINE_VALUES, choices, draws=DRAWS, seed=seed)
    finally:
        model.set_sparsity(before)


def _moved(here: SparsityPlan, there: SparsityPlan, part: float, costs: Costs, target: float) -> SparsityPlan | None:
    """Return the plan with the choices of ``there`` and S a part of the way to it, shifted to meet the budget.

    None if no S meets it with these choices.
    """
    offsets = {cell: (1 - part) * sparsity_of(here, cell) + part * sparsity_of(there, cell) for cell in cells_of(here)}
    try:
        return shifted(there, offsets, costs, target)
    except OutOfReach:
        return None
