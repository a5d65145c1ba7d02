"""The estimated change of the loss under a whole plan: S of every cell and the choice of ranks of every layer together.

``estimate`` squares the sums of one change. Here the sums g*.d of all changes are kept for every piece (a document in
one sequence) and added before they are squared, so that the Gauss-Newton term has all interactions between cells,
layers, sites, and choices of ranks:

    loss change  =  sum of first-order terms  +  mean over draws of half of the sum over pieces of (sum of g*.d)^2

At the sites of the experts the sums exist for every choice of ranks: the rows of a rank that is not used have no part,
and those of the others have the weights that the choice gives them. Between two values of S the sums are interpolated.

n cells of a layer, O choices, X values of S, Q pieces times draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of
from qsparse_moe.ablation.routing import Choice
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.estimate import STE_SHARE
from qsparse_moe.ablation.sensitivity.passes import Changes, PassSums, run_passes
from qsparse_moe.ablation.sensitivity.sums import PieceSums
from qsparse_moe.data.packing import Array
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan


@dataclass(frozen=True)
class LayerTerms:
    """The sums of one layer."""

    choices: tuple[Choice | None, ...]
    """The O choices of ranks; a single None in a layer without routed experts."""
    cells: tuple[Cell, ...]
    routing_first_O: Array
    routing_drawn_OQ: Array
    first_OnX: Array
    drawn_OnQX: Array

    @cached_property
    def squares_OnX(self) -> Array:
        """The sums of squares over the pieces, of every cell alone."""
        return np.stack([np.square(drawn_nQX).sum(1) for drawn_nQX in self.drawn_OnQX])


@dataclass(frozen=True)
class PlanTerms:
    """The sums of all layers around one plan."""

    plan: SparsityPlan
    values: Array
    """The X values of S, ascending."""
    layers: tuple[LayerTerms, ...]
    share: float
    """Factor of the sum of squares over Q: half of the mean over draws."""
    num_labels: float
    load: Mapping[int, Mapping[Choice, tuple[float, ...]]]
    """Share of tokens that use each expert, per MoE layer and choice."""

    def change(self, plan: SparsityPlan, choices: Mapping[int, Choice]) -> float:
        """Return the estimated change of the loss under ``plan`` with these choices, in nats per token."""
        moved = [_moved(terms, self.values, plan, choices) for terms in self.layers]
        first = sum(one.routing_first + one.first_n.sum() for one in moved)
        return float(first + self.share * np.square(_total(moved)).sum()) / self.num_labels

    def parts(self, plan: SparsityPlan, choices: Mapping[int, Choice]) -> PlanParts:
        """Return ``change`` divided among the cells and the choices of ranks, which add up to it.

        Every interaction of two changes, twice the product of their sums, is divided equally between the two. These are
        the Shapley values of the estimate (Shapley 1953), which is quadratic.
        """
        moved = [_moved(terms, self.values, plan, choices) for terms in self.layers]
        total_Q = _total(moved)
        cells: dict[Cell, float] = {}
        routing: dict[int, float] = {}
        for terms, one in zip(self.layers, moved, strict=True):
            own_n = (one.first_n + self.share * one.drawn_nQ @ total_Q) / self.num_labels
            cells.update(zip(terms.cells, own_n.tolist(), strict=True))
            if terms.choices != (None,):
                own = one.routing_first + self.share * float(one.routing_drawn_Q @ total_Q)
                routing[terms.cells[0].layer] = float(own) / self.num_labels
        return PlanParts(cells, routing)


class PlanParts(NamedTuple):
    """The parts of the estimated change of the loss under a plan, in nats per token."""

    cells: dict[Cell, float]
    routing: dict[int, float]
    """The part of the choice of ranks, per MoE layer."""

    @property
    def total(self) -> float:
        """Return the estimated change of the loss."""
        return sum(self.cells.values()) + sum(self.routing.values())


class _LayerMoved(NamedTuple):
    """The sums of one layer under another plan."""

    first_n: Array
    drawn_nQ: Array
    routing_first: float
    routing_drawn_Q: Array


def _moved(terms: LayerTerms, values: Array, plan: SparsityPlan, choices: Mapping[int, Choice]) -> _LayerMoved:
    which = terms.choices.index(choices.get(terms.cells[0].layer))
    sparsity_n = np.array([sparsity_of(plan, cell) for cell in terms.cells])
    return _LayerMoved(
        interpolated(terms.first_OnX[which], values, sparsity_n),
        interpolated(terms.drawn_OnQX[which], values, sparsity_n),
        float(terms.routing_first_O[which]),
        terms.routing_drawn_OQ[which],
    )


def _total(moved: Sequence[_LayerMoved]) -> Array:
    return np.sum([one.routing_drawn_Q + one.drawn_nQ.sum(0) for one in moved], axis=0)


def interpolated(terms: Array, values: Array, sparsity_n: Array) -> Array:
    """Return ``terms`` ``(n, ..., X)`` at one S per cell, ``(n, ...)``, linear between two values."""
    below_n = np.clip(np.searchsorted(values, sparsity_n, side="right") - 1, 0, len(values) - 2)
    share_n = (sparsity_n - values[below_n]) / (values[below_n + 1] - values[below_n])
    rows = np.arange(len(terms))
    share = share_n.reshape(-1, *[1] * (terms.ndim - 2))
    return (1.0 - share) * terms[rows, ..., below_n] + share * terms[rows, ..., below_n + 1]


def plan_terms(
    model: Transformer,
    sequences: DocumentSequences,
    values: Sequence[float],
    choices: Mapping[int, Sequence[Choice]],
    *,
    draws: int = 2,
    ste_share: float = STE_SHARE,
    seed: int = 0,
) -> PlanTerms:
    """Return the sums around the plan of the model, from one forward and ``1 + draws`` backward passes.

    Memory: 4 bytes per piece, draw, value, and cell, at the sites of the experts also per choice.

    Args:
        model: a model that selects by rank, on any device.
        sequences: the sequences to measure on.
        values: values of S, ascending; at least two.
        choices: the choices of ranks of every MoE layer, among them that of the plan.
        draws: as in ``estimate``. The interactions of many cells need more draws than the terms of single cells do.
        ste_share: as in ``estimate``.
        seed: as in ``estimate``.
    """
    plan, grid = model.sparsity_plan, np.array(values)
    found = run_passes(
        model,
        sequences,
        Changes(values, choices, choices),
        ste_share=ste_share,
        draws=draws,
        seed=seed,
        keep=True,
    )
    return PlanTerms(
        plan=plan,
        values=grid,
        layers=tuple(_layer_terms(plan, found, layer, choices, grid) for layer in range(model.config.num_layers)),
        share=1 / (2 * draws),
        num_labels=float(sequences.labels_C.sum()),
        load=found.load,
    )


def _layer_terms(
    plan: SparsityPlan, found: PassSums, layer: int, choices: Mapping[int, Sequence[Choice]], values: Array
) -> LayerTerms:
    own = tuple(choices.get(layer, (None,)))
    routing = found.routing.get(layer)
    cells = [cell for cell in cells_of(plan) if cell.layer == layer]
    first, drawn = [], []
    for site in plan.sites(layer):
        sums = found.sites[layer, site]
        count = len([cell for cell in cells if cell.site == site])
        first.append(_by_choice(sums.first_RCX[:, 0].numpy(), count, len(own)))
        # Q before X, so that a sum over the pieces is one matrix product per cell.
        drawn.append(_by_choice(torch.cat(sums.drawn, 1).numpy(), count, len(own)))
    now_n = np.array([sparsity_of(plan, cell) for cell in cells])
    first_OnX, drawn_OnQX = np.concatenate(first, 1), np.concatenate(drawn, 1)
    num_pieces = drawn_OnQX.shape[2]
    return LayerTerms(
        own,
        tuple(cells),
        np.zeros(1) if routing is None else routing.first_RCX[:, 0, 0].numpy(),
        np.zeros((1, num_pieces)) if routing is None else _drawn(routing)[..., 0],
        _from_current(first_OnX, values, now_n),
        _from_current(drawn_OnQX, values, now_n),
    )


def _drawn(sums: PieceSums) -> Array:
    return torch.cat(sums.drawn, 1).numpy()


def _by_choice(terms_RX: Array, count: int, num_choices: int) -> Array:
    """Return ``(O, count, ...)``: changes in the order of ``SiteListener``, or those of a site without experts."""
    if len(terms_RX) == count * num_choices:
        return np.swapaxes(terms_RX.reshape(count, num_choices, *terms_RX.shape[1:]), 0, 1)
    return np.broadcast_to(terms_RX[None], (num_choices, *terms_RX.shape))


def _from_current(terms_OnX: Array, values: Array, now_n: Array) -> Array:
    """Shift the terms so that the interpolation, like the change itself, is 0 at the current S."""
    here = np.stack([interpolated(terms, values, now_n) for terms in terms_OnX])
    return terms_OnX - here[..., None]
