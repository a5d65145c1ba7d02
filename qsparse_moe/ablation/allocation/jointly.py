"""Allocate both sparsities to a model in rounds: estimate around a plan, solve, move, and estimate again.

The estimate is that of a whole plan (``sensitivity/joint.py``). It is valid near the plan at which it was made, so S
moves half of the way to the solution in every round, and the choices of ranks move by whole ranks. Of all plans on the
way, the one with the least evaluated loss on the same sequences is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qsparse_moe.ablation.allocation.allocate import FINE_VALUES, shifted
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.problem import Problem
from qsparse_moe.ablation.cells import cells_of, sparsity_of
from qsparse_moe.ablation.routing import Choice, choices_of
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, loss_by_document
from qsparse_moe.ablation.sensitivity.joint import plan_terms
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

_RADIUS = 0.25
_SHARES = (1.0, 0.5)
DRAWS = 2
"""Draws of labels per estimate: the interactions of many cells are noisier than the terms of one cell."""


def mean_loss(model: Transformer, sequences: DocumentSequences, plan: SparsityPlan) -> float:
    """Return the loss under ``plan`` in nats per token. The plan of the model is the same after the call."""
    before = model.sparsity_plan
    model.set_sparsity(plan)
    try:
        return float(loss_by_document(model, sequences).sum() / sequences.labels_C.sum())
    finally:
        model.set_sparsity(before)


def improved(
    model: Transformer,
    sequences: DocumentSequences,
    costs: Costs,
    target: float,
    start: SparsityPlan,
    choices: Mapping[int, Sequence[Choice]],
    *,
    rounds: int = 3,
    free_sparsity: bool = True,
) -> list[tuple[float, SparsityPlan]]:
    """Return the plans of all rounds with their evaluated losses, from ``start`` on, all within the budget."""
    before, here = model.sparsity_plan, start
    visited = [(mean_loss(model, sequences, start), start)]
    try:
        for number in range(rounds):
            model.set_sparsity(here)
            # Another draw of labels in every round, so that no round fits the noise of one.
            terms = plan_terms(model, sequences, FINE_VALUES, choices, draws=DRAWS, seed=number)
            own = replace(costs, loads=terms.load)
            problem = Problem.of(terms, own, target, radius=_RADIUS, free_sparsity=free_sparsity)
            there = problem.plan_of(problem.solve())
            steps = [_moved(here, there, share, own, target) for share in _SHARES] if free_sparsity else [there]
            visited += [(mean_loss(model, sequences, plan), plan) for plan in steps]
            print(
                "   est",
                [round(terms.change(p, choices_of(p, model.config)), 4) for p in [here] + steps],
                [round(v[0], 4) for v in visited[-len(steps) :]],
                [(c.experts, c.top_p) for c in choices_of(there, model.config).values()],
            )
            here = min(visited[-len(steps) :], key=lambda one: one[0])[1]
    finally:
        model.set_sparsity(before)
    return visited


def _moved(here: SparsityPlan, there: SparsityPlan, share: float, costs: Costs, target: float) -> SparsityPlan:
    """Return the plan with the choices of ``there`` and S a share of the way to it, shifted to meet the budget."""
    cells = cells_of(here)
    offsets = {cell: (1 - share) * sparsity_of(here, cell) + share * sparsity_of(there, cell) for cell in cells}
    return shifted(there, offsets, costs, target)
