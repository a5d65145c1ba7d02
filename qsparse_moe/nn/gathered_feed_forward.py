"""A feed-forward network whose products read the shared features of its sites only, at their true size.

Its reference is the same network with masked rows and whole matrices: the sites and products of ``Experts`` and
``FeedForward``. Both agree to rounding, forward and in every gradient.

N rows sorted by expert, L stacked matrices (one per expert of this rank), X inputs, Y outputs, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsparse_moe.nn.gated_activation import SparseActivation
from qsparse_moe.nn.gathered import take_features, take_weights
from qsparse_moe.nn.shared_selector import SharedSelector
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.shared_sets import FeatureSets
from qsparse_moe.sparsity.stats import Stats


class Weights(NamedTuple):
    """The stacked matrices of a feed-forward network, rounded as its products read them."""

    gate_LDF: Tensor | None
    up_LDF: Tensor
    down_LFD: Tensor


@dataclass(frozen=True)
class RowsOfExperts:
    """Rows sorted by expert, and their products with stacked matrices."""

    counts: list[int]
    """Number of rows of each of the L experts."""
    matmul: Callable[[Tensor, Tensor], Tensor]
    """Returns the rows ``(N, X)`` times the matrix of their expert in ``(L, X, Y)``."""
    matmul_pair: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Returns the products of the same rows with two stacks."""
    expert_N: Tensor | None = None
    """The expert of each row, numbered among all; None if there is only one."""
    first_expert: int = 0
    """The first of the L experts of this rank among all."""

    def times(self, x_NX: Tensor, stacks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the products of the rows with one or two stacks."""
        return self.matmul_pair(x_NX, *stacks) if len(stacks) == 2 else (self.matmul(x_NX, *stacks),)

    def take(self, x_NX: Tensor, sets: FeatureSets) -> Tensor:
        """Return the features of each row that its expert has selected, zero at positions that are not used."""
        return self.without_unused(take_features(x_NX, sets.index_EK, self.counts), sets)

    def without_unused(self, x_NK: Tensor, sets: FeatureSets) -> Tensor:
        """Return rows of selected features with zeros at the positions that their expert does not use."""
        if sets.used_EK is None:
            return x_NK
        lengths = torch.tensor(self.counts, device=x_NK.device)
        return x_NK * sets.used_EK.repeat_interleave(lengths, dim=0, output_size=len(x_NK))


def gathered_feed_forward(
    x_ND: Tensor,
    weights: Weights,
    sites: tuple[SparseSite, SparseSite],
    activation: SparseActivation,
    rows: RowsOfExperts,
) -> tuple[Tensor, Stats, Stats]:
    """Return ``(N, D)`` and the sums that the input site and the hidden site measure.

    The hidden features outside of the sets are not computed if the sets are known before, nothing is measured in this
    pass, and no feature outside of them receives a gradient.
    """
    inputs, hidden = (_shared(site) for site in sites)
    straight_through = sites[1].ste_share == 1.0
    dtype = x_ND.dtype
    input_sets = _sets(inputs, x_ND, rows)
    input_stats = inputs.measured(x_ND, rows.expert_N)
    # Under the straight-through estimator every hidden feature has a gradient, and with it those of gate and up.
    shrinks = hidden.is_known_before and not (hidden.is_measuring or hidden.selects_all or straight_through)
    hidden_sets = _sets(hidden, None, rows) if shrinks else None
    outputs = None if hidden_sets is None else hidden_sets.index_EK
    inner = (weights.up_LDF,) if weights.gate_LDF is None else (weights.gate_LDF, weights.up_LDF)
    products = _products(x_ND.to(inner[0].dtype), inner, input_sets, rows, outputs, straight_through)
    *gate, up_NF = (product.to(dtype) for product in products)
    hidden_NF = activation.dense(gate[0] if gate else None, up_NF)
    if hidden_sets is not None:
        selected_NK = rows.without_unused(hidden_NF, hidden_sets).to(weights.down_LFD.dtype)
        y_ND = rows.matmul(selected_NK, take_weights(weights.down_LFD, outputs, None))
        return y_ND.to(dtype), input_stats, {}
    hidden_stats = hidden.measured(hidden_NF, rows.expert_N)
    hidden_sets = _sets(hidden, hidden_NF, rows)
    (y_ND,) = _products(
        hidden_NF.to(weights.down_LFD.dtype), (weights.down_LFD,), hidden_sets, rows, None, straight_through
    )
    return y_ND.to(dtype), input_stats, hidden_stats


def _shared(site: SparseSite) -> SharedSelector:
    assert site.shared is not None, "gathered products need sites with a shared selection"
    return site.shared


def _sets(selector: SharedSelector, x_NX: Tensor | None, rows: RowsOfExperts) -> FeatureSets | None:
    """Return the sets of this rank's experts; None if the site selects every feature."""
    experts = slice(rows.first_expert, rows.first_expert + len(rows.counts))
    return None if selector.selects_all else selector.sets(x_NX, rows.expert_N, experts)


def _products(
    x_NX: Tensor,
    weights: Sequence[Tensor],
    sets: FeatureSets | None,
    rows: RowsOfExperts,
    outputs_LK: Tensor | None,
    straight_through: bool,
) -> tuple[Tensor, ...]:
    """Return the products of the selected features with each stack of weights.

    Args:
        x_NX: the dense rows.
        weights: stacks ``(L, X, Y)``.
        sets: the selected features; None: all of them.
        rows: the experts of the rows.
        outputs_LK: the columns to compute; None: all of them.
        straight_through: whether the features outside of the sets receive a gradient.
    """
    if sets is None:
        return rows.times(x_NX, [take_weights(stack, None, outputs_LK) for stack in weights])
    source = x_NX.detach() if straight_through else x_NX
    selected_NK = rows.take(source, sets)
    products = rows.times(selected_NK, [take_weights(stack, sets.index_EK, outputs_LK) for stack in weights])
    if not (straight_through and x_NX.requires_grad):
        return products
    return _DenseInputGradient.apply(x_NX, rows, len(weights), *(stack.detach() for stack in weights), *products)


class _DenseInputGradient(torch.autograd.Function):
    """The products themselves forward; backward, the gradient of every input feature, selected or not.

    This is the straight-through estimator: the gradient of the selection is the identity.
    """

    @staticmethod
    def forward(ctx: Any, x_NX: Tensor, rows: RowsOfExperts, num: int, *others: Tensor) -> tuple[Tensor, ...]:
        weights, products = others[:num], others[num:]
        ctx.save_for_backward(*weights)
        ctx.rows = rows
        return tuple(product.view_as(product) for product in products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        parts = [ctx.rows.matmul(grad, stack.mT) for grad, stack in zip(grads, weights, strict=True)]
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return total, None, None, *(None for _ in weights), *grads
