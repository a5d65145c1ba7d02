"""Which S each cell should have, so that a plan keeps to a budget at the least loss.

Every cell has a curve of loss by cost, from its sensitivities. On the lower convex hull of it each step towards less
cost has a price, the loss that it adds for what it saves; taking all cells' steps in the order of their prices
minimises the sum of losses at every cost the steps come to (Everett 1963: the price at which it stops is the Lagrange
multiplier). The last step is taken as far as the budget asks.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.cells import Cell, cells_of, with_cells
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

Curve = Sequence[tuple[float, float]]
"""Of one cell: pairs of S, ascending, and change of loss."""
MOST_SPARSE = 0.95
FINE_VALUES = tuple(round(0.05 * step, 2) for step in range(20))
_HALVINGS = 40


class _Step(NamedTuple):
    price: float
    cell: Cell
    before: float
    after: float


def lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points (x, y), by ascending x; of equal x the lowest y (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and hull[-1][0] == x:
            continue
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def allocate(plan: SparsityPlan, curves: Mapping[Cell, Curve], costs: Costs, target: float) -> SparsityPlan:
    """A plan whose cost is at most ``target`` (of mean S: at least), by as little as one feature of one cell allows.

    Args:
        plan: gives the places; a cell without a curve keeps its S.
        curves: by cell.
        costs: of a cell and of the whole.
        target: the budget in the unit of ``costs``.

    Raises:
        ConfigError: no plan on the curves keeps to it; with the nearest budget that one does.
    """
    start = with_cells(plan, {cell: curve[0][0] for cell, curve in curves.items()})
    least = with_cells(plan, {cell: curve[-1][0] for cell, curve in curves.items()})
    room = costs.total_at(target)
    check_budget(costs, least, target)
    total = _total(costs, start)
    waiting = [step for cell, curve in curves.items() for step in _steps(cell, curve, costs)]
    heapq.heapify(waiting)
    changed: dict[Cell, float] = {}
    while total > room:
        step = heapq.heappop(waiting)
        after = costs.of_cell(step.cell, step.after)
        saved = costs.of_cell(step.cell, step.before) - after
        if total - saved <= room:
            changed[step.cell] = _partly(costs, step, after + room - (total - saved))
            break
        changed[step.cell], total = step.after, total - saved
    return with_cells(start, changed)


def check_budget(costs: Costs, least: SparsityPlan, target: float) -> None:
    """Raise ConfigError, with the nearest budget, where even ``least``, the sparsest plan, costs more."""
    if _total(costs, least) > costs.total_at(target) * (1 + 1e-9):
        direction = "less" if costs.quantity == "sparsity" else "more"
        raise ConfigError(
            f"a budget of {_told(costs, target)} cannot be met: with S at most {MOST_SPARSE:g} everywhere the nearest "
            f"is {_told(costs, costs.of(least))}; ask for that or {direction}"
        )


def _told(costs: Costs, value: float) -> str:
    if costs.quantity == "sparsity":
        return f"mean S {value:.4f}"
    unit = {"parameters": "active parameters", "flops": "FLOPs a token", "bytes": f"bytes a step of {costs.batch}"}
    return f"{value:,.0f} {unit[costs.quantity]}"


def _total(costs: Costs, plan: SparsityPlan) -> float:
    return costs.total_at(costs.of(plan))


def _steps(cell: Cell, curve: Curve, costs: Costs) -> list[_Step]:
    """Along the hull, from the densest S to the sparsest: their prices rise. A cell that no token uses has none."""
    by_cost: dict[float, float] = {}
    for sparsity, _ in curve:
        by_cost[costs.of_cell(cell, sparsity)] = sparsity
    hull = lower_hull([(costs.of_cell(cell, sparsity), loss) for sparsity, loss in curve])[::-1]
    return [
        _Step((there[1] - here[1]) / (here[0] - there[0]), cell, by_cost[here[0]], by_cost[there[0]])
        for here, there in zip(hull, hull[1:], strict=False)
    ]


def _partly(costs: Costs, step: _Step, most: float) -> float:
    """The least S between the step's two at which the cell costs at most ``most``."""
    low, high = step.before, step.after
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if costs.of_cell(step.cell, middle) <= most else (middle, high)
    return high


def uniform_at(plan: SparsityPlan, costs: Costs, target: float) -> SparsityPlan:
    """The same S everywhere, the least that keeps to the budget.

    Raises:
        ConfigError: none does.
    """
    return shifted(plan, dict.fromkeys(cells_of(plan), 0.0), costs, target)


def shifted(plan: SparsityPlan, offsets: Mapping[Cell, float], costs: Costs, target: float) -> SparsityPlan:
    """S = offset + t in every cell, cut to [0, 0.95], with the least t that keeps to the budget.

    Raises:
        ConfigError: none does.
    """

    def at(level: float) -> SparsityPlan:
        return with_cells(plan, {cell: min(MOST_SPARSE, max(0.0, o + level)) for cell, o in offsets.items()})

    spread = max(map(abs, offsets.values()))
    low, high, room = -spread, MOST_SPARSE + spread, costs.total_at(target)
    check_budget(costs, at(high), target)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(costs, at(middle)) <= room else (middle, high)
    return at(high)


def allocate_for(
    model: Transformer, sequences: DocumentSequences, costs: Costs, target: float, *, rounds: int = 3
) -> SparsityPlan:
    """The plan of ``allocate`` with curves estimated around what the round before found, the first around uniform S.

    Each round is one estimate, and goes half of the way: curves hold near the plan they were made at. The model keeps
    its plan.
    """
    before = model.sparsity_plan
    found = uniform_at(before, costs, target)
    try:
        for _ in range(rounds):
            model.set_sparsity(found)
            curves = estimated_curves(model, sequences)
            wished = allocate(found, curves, costs, target)
            found = _between(found, wished, costs, target)
    finally:
        model.set_sparsity(before)
    return found


def estimated_curves(model: Transformer, sequences: DocumentSequences) -> dict[Cell, Curve]:
    """Of every cell, at S from 0 to 0.95 by 0.05, around the model's plan."""
    estimated = estimate(model, sequences, FINE_VALUES)
    return {
        cell: list(zip(FINE_VALUES, estimated.total(cell).sum(-1).tolist(), strict=True))
        for cell in cells_of(model.sparsity_plan)
    }


def _between(here: SparsityPlan, there: SparsityPlan, costs: Costs, target: float) -> SparsityPlan:
    """Half of the way, brought to the budget: the cost of the mean of two plans may differ by a rounding of K."""
    pairs = zip(cells_of(here), _flat(here), _flat(there), strict=True)
    return shifted(here, {cell: (a + b) / 2 for cell, a, b in pairs}, costs, target)


def _flat(plan: SparsityPlan) -> list[float]:
    return [value for values in plan.values.values() for value in values]
