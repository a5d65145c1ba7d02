"""A MoE layer that combines its experts by any choice of ranks, while all ranks of choice are computed.

T tokens, D width, A experts per token as the model routes, N = T A routed rows, O choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.ablation.routing import Choice, choice_weights, renormalizes
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.permutation import Permutation, SortedTokens, permute_reference, sort_by_expert


class RoutedLayer:
    """The permutation of one layer, with the weights of ``choice`` in place of the router's.

    In the backward pass the expert of every rank gets the gradient of the layer output with weight 1, so that ranks
    which the choice does not use have a gradient as well. The weight is applied where the gradient leaves the experts:
    what is before the layer gets the gradient of the loss.
    """

    def __init__(self, moe: MoELayer, choice: Choice, *, renormalized: bool) -> None:
        self.choice, self.renormalized = choice, renormalized
        self.num_experts = moe.num_experts
        self.router_weights_TA = self.used_TA = self.rows_TAD = torch.zeros(0)
        self.routed: SortedTokens | None = None
        self.on_output: Callable[[], None] | None = None
        """Called in every forward pass after the experts are combined."""
        self.on_gradient: Callable[[Tensor], None] | None = None
        """Called with the gradient of the layer output in every backward pass."""
        self.permutation = Permutation(sort_by_expert, self._permute, self._combine)

    def weights_of(self, choice: Choice) -> Tensor:
        """Return the weights ``(T, A)`` of the last forward pass under another choice."""
        return choice_weights(self.router_weights_TA, choice, renormalized=self.renormalized)

    def gradient_of_rows(self) -> Tensor:
        """Return the weights in use ``(N,)``, by which the gradient of a row is multiplied behind the experts."""
        assert self.routed is not None
        return self.used_TA.flatten()[self.routed.slot_N]

    def _permute(self, x_TD: Tensor, routed: SortedTokens) -> Tensor:
        self.routed = routed
        return _WeightGradient.apply(permute_reference(x_TD, routed), self)

    def _combine(self, y_ND: Tensor, weights_TA: Tensor, routed: SortedTokens) -> Tensor:
        rows_TAD = y_ND[routed.row_TA]
        used_TA = choice_weights(weights_TA, self.choice, renormalized=self.renormalized)
        self.router_weights_TA, self.used_TA = weights_TA.detach(), used_TA.detach()
        self.rows_TAD = rows_TAD.detach()
        y_TD = _CombineUnweighted.apply(rows_TAD, used_TA)
        if self.on_output is not None:
            self.on_output()
        if self.on_gradient is not None and y_TD.requires_grad:
            y_TD.register_hook(self.on_gradient)
        return y_TD


class _WeightGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by the weights in use."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, layer: RoutedLayer) -> Tensor:
        ctx.layer = layer
        return x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        # Known only now: the experts are combined after their rows were made.
        return grad_ND * ctx.layer.gradient_of_rows()[:, None].to(grad_ND.dtype), None


class _CombineUnweighted(torch.autograd.Function):
    """The weighted sum of each token's rows, whose gradient reaches every row with weight 1."""

    @staticmethod
    def forward(ctx: Any, rows_TAD: Tensor, weights_TA: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TAD)
        return (rows_TAD * weights_TA[..., None]).sum(1).to(rows_TAD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        (rows_TAD,) = ctx.saved_tensors
        wide_TD = grad_TD.to(torch.promote_types(grad_TD.dtype, torch.float32))
        return grad_TD[:, None].expand_as(rows_TAD), (rows_TAD * wide_TD[:, None]).sum(-1)


@contextmanager
def routed_layers(model: Transformer, choices: Mapping[int, Choice]) -> Iterator[dict[int, RoutedLayer]]:
    """Combine the experts of these layers by these choices inside the context. The layers must route to all A."""
    found: dict[int, RoutedLayer] = {}
    before: dict[int, Permutation] = {}
    moes = {block.layer: block.moe for block in model.blocks() if block.moe is not None}
    try:
        for layer, choice in choices.items():
            before[layer] = moes[layer].permutation
            found[layer] = RoutedLayer(moes[layer], choice, renormalized=renormalizes(model.config))
            moes[layer].permutation = found[layer].permutation
        yield found
    # Also after an interrupt: the caller keeps its model.
    finally:
        for layer, permutation in before.items():
            moes[layer].permutation = permutation
