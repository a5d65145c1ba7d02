"""Minimise the estimated loss of a whole plan under a budget: S of every cell, and the choice of ranks of every layer.

The estimate is quadratic: the sums of all cells are added per piece of a document before they are squared. With all
others fixed, every cell has a curve of loss over S. At a price per cost, each cell takes the S with the least loss plus
price times cost, and bisection finds the price at which the budget is met (Everett 1963). As all cells move at once, a
step is followed only as far as the estimated loss falls, and the curves are made again from there. The choices of ranks
are searched layer by layer: a choice is taken if the loss is lower after S has been balanced again.

n cells of a layer, O choices, X values of S, Q pieces times draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.cells import sparsity_of, with_cells
from qsparse_moe.ablation.routing import choices_of, with_choices
from qsparse_moe.ablation.sensitivity.joint import LayerTerms, PlanTerms, interpolated
from qsparse_moe.data.packing import Array
from qsparse_moe.sparsity.plan import SparsityPlan

_HALVINGS = 40
_STEPS = (1.0, 0.5, 0.25, 0.1)
"""Parts of the way to the balance at the current curves, of which the one with the least estimated loss is taken."""
_SWEEPS = 4
_PRICES = 200
# A choice must lower the loss by more than rounding, or two choices could alternate.
_LEAST_GAIN = 1e-7


class Point(NamedTuple):
    """One plan in the coordinates of the problem."""

    picks: tuple[int, ...]
    """The index of the choice of every layer."""
    sparsity: tuple[Array, ...]
    """``(n,)`` per layer."""
    loss: float
    """The estimated change of the loss, in nats per token; infinite beyond the budget."""


@dataclass(frozen=True)
class Problem:
    """The terms of a model around one plan, and the cost of every cell at every S under every choice."""

    terms: PlanTerms
    costs: tuple[Array, ...]
    """``(O, n, X)`` per layer."""
    budget: float
    """The sum of the costs that a plan may have."""
    here: Point
    """The plan that the terms were estimated around."""
    radius: float
    """How far S of a cell may move from there."""

    @classmethod
    def of(cls, terms: PlanTerms, costs: Costs, target: float, *, radius: float) -> Problem:
        """Return the problem of a budget in the unit of ``costs``, whose loads have all choices of the terms."""
        choices = choices_of(terms.plan, costs.config)
        here = Point(
            tuple(layer.choices.index(choices.get(layer.cells[0].layer)) for layer in terms.layers),
            tuple(np.array([sparsity_of(terms.plan, cell) for cell in layer.cells]) for layer in terms.layers),
            np.inf,
        )
        tables = tuple(_cost_table(layer, terms.values, costs) for layer in terms.layers)
        return cls(terms, tables, costs.total_at(target), here, radius)

    def plan_of(self, point: Point) -> SparsityPlan:
        """Return the plan of a point."""
        changed = {
            cell: float(sparsity)
            for layer, own in zip(self.terms.layers, point.sparsity, strict=True)
            for cell, sparsity in zip(layer.cells, own, strict=True)
        }
        choices = {
            layer.cells[0].layer: layer.choices[pick]
            for layer, pick in zip(self.terms.layers, point.picks, strict=True)
        }
        known = {number: choice for number, choice in choices.items() if choice is not None}
        return with_choices(with_cells(self.terms.plan, changed), known)

    def solve(self) -> Point:
        """Return the best point that is found. The choice of a layer moves to a neighbour in cost at most."""
        best = self.balanced(self.here.picks, self.here.sparsity)
        for _ in range(_SWEEPS):
            before = best.loss
            for picks in self._neighbours(best.picks):
                found = self.balanced(picks, best.sparsity, steps=2)
                if found.loss < best.loss - _LEAST_GAIN:
                    best = found
            if best.loss >= before:
                break
        return self.balanced(best.picks, best.sparsity)

    def routing_alone(self) -> Point:
        """Return the best choices within the budget that are found while every S stays as it is.

        At every price the layers take their best choice in turns; of all prices the one with the least loss counts.
        """
        fixed = [
            interpolated_cost(table, self.terms.values, own)
            for table, own in zip(self.costs, self.here.sparsity, strict=True)
        ]
        best = self.here
        for price in self._routing_prices(fixed):
            picks = self._turns(price, fixed)
            if sum(cost_O[pick] for cost_O, pick in zip(fixed, picks, strict=True)) <= self.budget * (1 + 1e-9):
                best = min(
                    best,
                    Point(picks, self.here.sparsity, self._loss(picks, self.here.sparsity)),
                    key=lambda point: point.loss,
                )
        return best

    def _routing_prices(self, fixed: Sequence[Array]) -> Array:
        """Return prices from far below to far above those at which the choice of a layer changes."""
        gains = [
            np.ptp(layer.routing_first_O + self.terms.share * np.square(layer.routing_drawn_OQ).sum(-1))
            for layer in self.terms.layers
        ]
        scale = sum(gains) / max(sum(np.ptp(cost_O) for cost_O in fixed), 1e-12)
        return scale * np.geomspace(1e-3, 1e3, _PRICES)

    def _turns(self, price: float, fixed: Sequence[Array]) -> tuple[int, ...]:
        picks, layers = list(self.here.picks), self.terms.layers
        total_Q = sum(layer.routing_drawn_OQ[pick] for layer, pick in zip(layers, picks, strict=True))
        for _ in range(_SWEEPS):
            for number, layer in enumerate(layers):
                others_Q = total_Q - layer.routing_drawn_OQ[picks[number]]
                square_O = np.square(others_Q + layer.routing_drawn_OQ).sum(-1)
                loss_O = layer.routing_first_O + self.terms.share * square_O + price * fixed[number]
                picks[number] = int(loss_O.argmin())
                total_Q = others_Q + layer.routing_drawn_OQ[picks[number]]
        return tuple(picks)

    def _neighbours(self, picks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for number, (pick, table) in enumerate(zip(self.here.picks, self.costs, strict=True)):
            # At the densest S, where the costs of two choices are farthest apart.
            order = table[:, :, 0].sum(-1).argsort(kind="stable").tolist()
            place = order.index(pick)
            for other in order[max(0, place - 1) : place + 2]:
                if other != picks[number]:
                    yield (*picks[:number], other, *picks[number + 1 :])

    def balanced(self, picks: tuple[int, ...], sparsity: tuple[Array, ...], steps: int = 6) -> Point:
        """Return the point with these choices after ``steps`` steps of S from ``sparsity``."""
        here = Point(picks, sparsity, self._loss(picks, sparsity))
        for _ in range(steps):
            towards = self._cheapest(picks, self._curves(picks, here.sparsity))
            # Beyond the budget only the whole step is known to be within it.
            shares = _STEPS if np.isfinite(here.loss) else (1.0,)
            moved = [_between(here.sparsity, towards, share) for share in shares]
            found = [Point(picks, each, self._loss(picks, each)) for each in moved]
            nearest = min(found, key=lambda point: point.loss)
            if not nearest.loss < here.loss:
                break
            here = nearest
        return here

    def cost(self, picks: tuple[int, ...], sparsity: tuple[Array, ...]) -> float:
        """Return the sum of the costs of all cells."""
        return float(
            sum(
                interpolated(table[pick], self.terms.values, own).sum()
                for table, pick, own in zip(self.costs, picks, sparsity, strict=True)
            )
        )

    def _loss(self, picks: tuple[int, ...], sparsity: tuple[Array, ...]) -> float:
        # The tolerance is that of the interpolated cost.
        if self.cost(picks, sparsity) > self.budget * (1 + 1e-6):
            return np.inf
        first, total_Q = 0.0, 0.0
        for layer, pick, own in zip(self.terms.layers, picks, sparsity, strict=True):
            first += layer.routing_first_O[pick]
            first += interpolated(layer.first_OnX[pick], self.terms.values, own).sum()
            total_Q = total_Q + layer.routing_drawn_OQ[pick]
            total_Q = total_Q + interpolated(layer.drawn_OnQX[pick], self.terms.values, own).sum(0)
        return float(first + self.terms.share * np.square(total_Q).sum()) / self.terms.num_labels

    def _curves(self, picks: tuple[int, ...], sparsity: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return ``(n, X)`` per layer: the estimated loss over S of every cell while the others stay."""
        values, layers = self.terms.values, self.terms.layers
        now = [
            interpolated(layer.drawn_OnQX[pick], values, own)
            for layer, pick, own in zip(layers, picks, sparsity, strict=True)
        ]
        total_Q = sum(now_nQ.sum(0) for now_nQ in now)
        total_Q = total_Q + sum(layer.routing_drawn_OQ[pick] for layer, pick in zip(layers, picks, strict=True))
        found = []
        for layer, pick, now_nQ in zip(layers, picks, now, strict=True):
            drawn_nQX = layer.drawn_OnQX[pick]
            # The square of (the others + own), less the square of the others.
            cross_nX = ((total_Q - now_nQ)[:, None] @ drawn_nQX)[:, 0]
            found.append(layer.first_OnX[pick] + self.terms.share * (2 * cross_nX + layer.squares_OnX[pick]))
        return tuple(found)

    def _cheapest(self, picks: tuple[int, ...], curves: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return the S at which the sum of the curves is least within the budget, as far as one price finds it."""
        tables = [table[pick] for table, pick in zip(self.costs, picks, strict=True)]
        counts = np.cumsum([len(curve_nX) for curve_nX in curves])[:-1]
        curve_nX, cost_nX = np.concatenate(curves), np.concatenate(tables)
        away_nX = np.abs(self.terms.values - np.concatenate(self.here.sparsity)[:, None])
        # Half of the spacing lets every cell have at least one value.
        reach = max(self.radius, np.diff(self.terms.values).max() / 2) + 1e-9
        curve_nX = np.where(away_nX <= reach, curve_nX, np.inf)
        low, high = _prices(curve_nX, cost_nX, self.budget)
        dear, cheap = (self.terms.values[_at_price(curve_nX, cost_nX, price)] for price in (low, high))
        spent = [interpolated(cost_nX, self.terms.values, each).sum() for each in (dear, cheap)]
        # The last step only as far as the budget requires: between the two values of S the cost is taken as linear.
        share = 1.0 if spent[0] <= self.budget else max(0.0, (self.budget - spent[1]) / max(spent[0] - spent[1], 1e-12))
        return tuple(np.split(cheap + share * (dear - cheap), counts))


def _cost_table(layer: LayerTerms, values: Array, costs: Costs) -> Array:
    return np.array(
        [
            [[costs.of_cell(cell, float(value), choice) for value in values] for cell in layer.cells]
            for choice in layer.choices
        ]
    )


def interpolated_cost(table_OnX: Array, values: Array, sparsity_n: Array) -> Array:
    """Return the cost of a layer under every choice, ``(O,)``, at these S."""
    return np.array([interpolated(cost_nX, values, sparsity_n).sum() for cost_nX in table_OnX])


def _at_price(curve_nX: Array, cost_nX: Array, price: float) -> Array:
    return (curve_nX + price * cost_nX).argmin(-1)


def _prices(curve_nX: Array, cost_nX: Array, budget: float) -> tuple[float, float]:
    """Return two prices close to each other: the plan at the first exceeds the budget, that at the second meets it.

    Both are 0 if the plan at price 0 meets it, and the second is the largest price if no plan does.
    """
    rows = np.arange(len(curve_nX))

    def spent(price: float) -> float:
        return float(cost_nX[rows, _at_price(curve_nX, cost_nX, price)].sum())

    if spent(0.0) <= budget:
        return 0.0, 0.0
    low, high = 0.0, _ptp(curve_nX) / np.ptp(cost_nX, axis=-1).sum()
    for _ in range(_HALVINGS):
        if spent(high) <= budget:
            break
        low, high = high, 4 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return low, high


def _ptp(curve_nX: Array) -> float:
    """Return the sum of the differences between the largest and the least loss of every cell within reach."""
    finite_nX = np.where(np.isfinite(curve_nX), curve_nX, np.nan)
    return float((np.nanmax(finite_nX, -1) - np.nanmin(finite_nX, -1)).sum())


def _between(here: tuple[Array, ...], there: tuple[Array, ...], share: float) -> tuple[Array, ...]:
    return tuple(a + share * (b - a) for a, b in zip(here, there, strict=True))
