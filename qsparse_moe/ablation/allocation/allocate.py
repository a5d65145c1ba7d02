"""Allocate S to every cell so that the plan meets a budget at the least loss.

Every cell has a curve of loss over cost, from its sensitivities. On the lower convex hull of the curve, each step
towards less cost has a price: the loss added per cost saved. Taking the steps of all cells in ascending order of price
minimises the sum of losses at every cost reached on the way (Everett 1963: the final price is the Lagrange multiplier).
The last step is taken only as far as the budget requires.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.defaults import ROUNDS
from qsparse_moe.ablation.allocation.reach import MOST_SPARSE, check_budget
from qsparse_moe.ablation.cells import Cell, cells_of, with_cells
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

Curve = Sequence[tuple[float, float]]
"""The curve of one cell: pairs of S, ascending, and the change of the loss."""
# Without rounding, 3 * 0.05 would be 0.15000000000000002.
FINE_VALUES = tuple(round(0.05 * step, 2) for step in range(20))
_HALVINGS = 40  # bisection to 1e-12 of the interval, far below the S that one feature makes


class _Step(NamedTuple):
    price: float
    cell: Cell
    before: float
    after: float


def lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of points (x, y) in ascending x (Andrew's monotone chain).

    Of several points with the same x, only the lowest counts.
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        # Points of one x are sorted by y, so the first of them was the lowest.
        if hull and hull[-1][0] == x:
            continue
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def allocate(plan: SparsityPlan, curves: Mapping[Cell, Curve], costs: Costs, target: float) -> SparsityPlan:
    """Return a plan whose cost is at most ``target``, and below it by less than one feature of one cell.

    If the budget is a mean S, the plan has at least that S.

    Args:
        plan: the plan whose cells are changed; a cell without a curve keeps its S.
        curves: the curve of each cell.
        costs: the cost model.
        target: the budget in the unit of ``costs``.

    Raises:
        OutOfReach: no plan on the curves meets the budget; the message names the least one that can be met.
    """
    start = with_cells(plan, {cell: curve[0][0] for cell, curve in curves.items()})
    least = with_cells(plan, {cell: curve[-1][0] for cell, curve in curves.items()})
    budget = costs.total_at(target)
    check_budget(costs, least, target)
    total = _total(costs, start)
    # A heap merges the steps of all cells by price. Along one hull prices rise, so a cell's steps stay in order.
    heap = [step for cell, curve in curves.items() for step in _steps(cell, curve, costs)]
    heapq.heapify(heap)
    changed: dict[Cell, float] = {}
    while total > budget:
        # There is always a step left, because check_budget has shown that all of them together meet the budget.
        step = heapq.heappop(heap)
        after = costs.of_cell(step.cell, step.after)
        saved = costs.of_cell(step.cell, step.before) - after
        if total - saved <= budget:
            changed[step.cell] = _partly(costs, step, after + budget - (total - saved))
            break
        changed[step.cell], total = step.after, total - saved
    return with_cells(start, changed)


def _total(costs: Costs, plan: SparsityPlan) -> float:
    return costs.total_at(costs.of(plan))


def _steps(cell: Cell, curve: Curve, costs: Costs) -> list[_Step]:
    """Return the steps along the hull from the densest S to the sparsest, with rising prices.

    A cell that no token uses has no steps, because nothing can be saved in it.
    """
    # Several S may round to the same K and cost; the sparsest of them names the point of the hull.
    by_cost: dict[float, float] = {}
    for sparsity, _ in curve:
        by_cost[costs.of_cell(cell, sparsity)] = sparsity
    hull = lower_hull([(costs.of_cell(cell, sparsity), loss) for sparsity, loss in curve])[::-1]
    return [
        _Step((there[1] - here[1]) / (here[0] - there[0]), cell, by_cost[here[0]], by_cost[there[0]])
        for here, there in zip(hull, hull[1:], strict=False)
    ]


def _partly(costs: Costs, step: _Step, most: float) -> float:
    """Return the least S within the step at which the cell costs at most ``most``."""
    low, high = step.before, step.after
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if costs.of_cell(step.cell, middle) <= most else (middle, high)
    # The upper end, so that the budget is met and never missed by a rounding.
    return high


def uniform_at(plan: SparsityPlan, costs: Costs, target: float) -> SparsityPlan:
    """Return the plan with the same S everywhere, the least that meets the budget.

    Raises:
        OutOfReach: no such plan meets the budget.
    """
    return shifted(plan, dict.fromkeys(cells_of(plan), 0.0), costs, target)


def shifted(plan: SparsityPlan, offsets: Mapping[Cell, float], costs: Costs, target: float) -> SparsityPlan:
    """Return the plan with S = offset + t in every cell, clipped to [0, 0.95], with the least t that meets the budget.

    Raises:
        OutOfReach: no such plan meets the budget.
    """

    def at(level: float) -> SparsityPlan:
        return with_cells(plan, {cell: min(MOST_SPARSE, max(0.0, o + level)) for cell, o in offsets.items()})

    largest = max(map(abs, offsets.values()))
    low, high, budget = -largest, MOST_SPARSE + largest, costs.total_at(target)
    # Measured milliseconds need not fall with S: at small widths, reading selected rows takes longer than reading all.
    if _total(costs, at(low)) <= budget:
        return at(low)
    check_budget(costs, at(high), target)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(costs, at(middle)) <= budget else (middle, high)
    return at(high)


def allocate_for(
    model: Transformer, sequences: DocumentSequences, costs: Costs, target: float, *, rounds: int = ROUNDS
) -> SparsityPlan:
    """Return the result of ``allocate`` after several rounds, the first around uniform S.

    Each round estimates the curves around the plan of the round before and moves half of the way towards the new
    allocation, because the curves are valid only near the plan at which they were estimated. The plan of the model is
    the same after the call.
    """
    before = model.sparsity_plan
    # Uniform S at the budget is the natural first plan: its curves are measured where the result will be.
    found = uniform_at(before, costs, target)
    try:
        for _ in range(rounds):
            model.set_sparsity(found)
            curves = estimated_curves(model, sequences)
            allocated = allocate(found, curves, costs, target)
            found = _halfway(found, allocated, costs, target)
    finally:
        model.set_sparsity(before)
    return found


def estimated_curves(model: Transformer, sequences: DocumentSequences) -> dict[Cell, Curve]:
    """Return the estimated curve of every cell around the plan of the model, at S from 0 to 0.95 in steps of 0.05."""
    estimated = estimate(model, sequences, FINE_VALUES)
    return {
        cell: list(zip(FINE_VALUES, estimated.total(cell).sum(-1).tolist(), strict=True))
        for cell in cells_of(model.sparsity_plan)
    }


def _halfway(here: SparsityPlan, there: SparsityPlan, costs: Costs, target: float) -> SparsityPlan:
    """Return the mean of two plans, shifted to the budget, which the mean can miss because cost is not linear in S."""
    pairs = zip(cells_of(here), _flat(here), _flat(there), strict=True)
    return shifted(here, {cell: (a + b) / 2 for cell, a, b in pairs}, costs, target)


def _flat(plan: SparsityPlan) -> list[float]:
    return [value for values in plan.values.values() for value in values]
