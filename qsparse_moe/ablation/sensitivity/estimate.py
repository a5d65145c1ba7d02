"""Estimate the change of the loss for another S in one cell, and for another choice of ranks in one layer.

All changes come from a single forward pass. A site turns a row x into a sparse row y(S), the K largest features of x
(rescaled if the run does so). Let g be the gradient of the summed loss with respect to the sparse row at the current
S0, and d = y(S) - y(S0). To second order, the loss of a cell changes by

    the sum over its rows of g.d,  plus half of d' G d  over all its rows together

G is the Gauss-Newton matrix of the loss with respect to the sparse rows, which is the Fisher information: d' G d is the
expectation of (sum over the rows of g*.d)^2, where g* is the gradient for labels drawn from the model. Tokens of one
document in one sequence attend to each other, so their terms are summed before squaring; pieces of different documents
are independent. One draw is enough because a batch has many pieces. A single sort of |x| gives g.y(S) for every S: the
running sums of g x and x^2 in descending order of |x|, read at K.

The output of a MoE layer is y = sum of w_r e_r over the ranks of choice r of a token. Another choice of ranks has other
weights w' (renormalised as the router does) and changes y by d = sum of (w'_r - w_r) e_r; g and g* are the gradients
with respect to y, and both terms are formed in the same way.

X values of S, O choices, C documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qsparse_moe.ablation.cells import Cell
from qsparse_moe.ablation.routing import RoutingCell, choices_of, single_changes
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.passes import Changes, run_passes
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.data.packing import Array
from qsparse_moe.model.transformer import Transformer


@dataclass(frozen=True)
class Estimate:
    """Both terms of the estimate, summed over the labels of each document, per cell and S, and per choice."""

    first: dict[Cell, Array]
    """``(X, C)`` nats: the first-order term."""
    second: dict[Cell, Array]
    """``(X, C)`` nats: the second-order term, never below 0."""
    first_routing: dict[RoutingCell, Array] = field(default_factory=dict)
    """``(C,)`` nats: the first-order term of another choice of ranks in one layer."""
    second_routing: dict[RoutingCell, Array] = field(default_factory=dict)
    """``(C,)`` nats: its second-order term, never below 0."""

    def total(self, cell: Cell) -> Array:
        """Return the sum of both terms, ``(X, C)``."""
        return self.first[cell] + self.second[cell]


# The whole straight-through gradient ranks better than half of it: 0.966 against 0.952 over the decided points
# (docs/lab-log.md, 27 November).
STE_SHARE = 1.0
DRAWS = 1
"""Number of label draws for the second-order term. Two draws changed the Spearman correlation by 0.004 (results.md)."""


def estimate(
    model: Transformer,
    sequences: DocumentSequences,
    values: Sequence[float],
    *,
    ste_share: float = STE_SHARE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Estimate both terms for every cell at each S of ``values``, and for every layer at each single change of ranks.

    It takes one forward and ``1 + draws`` backward passes. The plan, the weights, and the ``requires_grad`` flags of
    the model are the same after the call.

    Args:
        model: a model that selects by rank, on any device.
        sequences: the sequences to measure on, with their documents.
        values: the X values of S.
        ste_share: the share of the gradient that the other sites pass to the features they dropped. With 0, the first
            order is the derivative of the loss for fixed selections. A finite change, however, moves features over the
            thresholds of later sites. The straight-through gradient includes that effect, the derivative does not.
        draws: number of labels drawn per position from the predictions of the model.
        seed: the seed of the draws.
    """
    current = choices_of(model.sparsity_plan, model.config)
    num_ranks = model.config.moe.experts_per_token
    changes = Changes(
        values,
        routing={layer: single_changes(choice, num_ranks) for layer, choice in current.items()},
        sites={layer: [choice] for layer, choice in current.items()},
    )
    found = run_passes(model, sequences, changes, ste_share=ste_share, draws=draws, seed=seed, keep=False)
    first, second = {}, {}
    for (layer, site), sums in found.sites.items():
        for row in range(len(sums.first_RCX)):
            cell = Cell(layer, site, row if site in EXPERT_SITES else None)
            first[cell], second[cell] = (
                np.ascontiguousarray(terms[row].T.numpy()) for terms in (sums.first_RCX, sums.second_RCX)
            )
    first_routing, second_routing = {}, {}
    for layer, sums in found.routing.items():
        for row, choice in enumerate(changes.routing[layer]):
            changed = RoutingCell(layer, choice)
            first_routing[changed] = sums.first_RCX[row, :, 0].numpy()
            second_routing[changed] = sums.second_RCX[row, :, 0].numpy()
    return Estimate(first, second, first_routing, second_routing)
