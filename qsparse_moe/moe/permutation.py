"""Sorting of routed tokens by expert, and the weighted sum of the experts' outputs per token.

T tokens, A experts per token, N = T * A routed tokens, D width, E experts. N is smaller if some routed tokens exceed
the capacity of their expert: a dropped token is not among them and contributes nothing in either direction.

Both directions are gathers, forward and backward. There is no scatter-add, so no result depends on the order of
additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qsparse_moe.kernels.combine_rows.op import NATIVE, TORCH, TRITON, CombineRows, combine_rows


class SortedTokens(NamedTuple):
    """The N routed tokens, sorted by expert and within an expert by token: the rows of the matrices ``(N, ...)``."""

    token_N: Tensor
    """The token of each row."""
    slot_N: Tensor
    """The (token, choice) pair of each row, as ``token * A + choice``."""
    row_TA: Tensor
    """The row of each (token, choice) pair: the inverse of ``slot_N``. It is 0 for a dropped pair, which has no row."""
    expert_N: Tensor
    """The expert of each row, ascending."""
    tokens_per_expert_E: Tensor
    """int64; an expert without tokens has 0."""
    within_TA: Tensor | None
    """Bool: whether each (token, choice) pair is within the capacity of its expert; None without a capacity."""


def sort_by_expert(expert_ids_TA: Tensor, num_experts: int, within_TA: Tensor | None = None) -> SortedTokens:
    """Sort the (token, expert) pairs by expert, stably, and leave out those of which ``within_TA`` is false.

    Nothing is copied to the host except, with ``within_TA``, the number of remaining pairs.
    """
    flat_ids = expert_ids_TA.flatten()
    # Stable: within an expert the tokens keep their order, which is the order in which gradients are added.
    expert_N, slot_N = flat_ids.sort(stable=True)
    if within_TA is not None:
        remaining = positions_within_capacity(slot_N, within_TA)
        expert_N, slot_N = expert_N[remaining], slot_N[remaining]
    positions = torch.arange(len(slot_N), device=flat_ids.device)
    row_TA = torch.zeros_like(flat_ids).scatter_(0, slot_N, positions).view_as(expert_ids_TA)
    token_N = slot_N.div(expert_ids_TA.shape[1], rounding_mode="floor")
    return SortedTokens(token_N, slot_N, row_TA, expert_N, count_tokens(expert_N, num_experts), within_TA)


def positions_within_capacity(slot_N: Tensor, within_TA: Tensor) -> Tensor:
    """Return the positions among the rows ``slot_N`` whose (token, choice) pair is within capacity, ascending.

    Their number is copied to the host.
    """
    return within_TA.flatten()[slot_N].nonzero().squeeze(1)


def count_tokens(expert_N: Tensor, num_experts: int) -> Tensor:
    """Return the number of routed tokens per expert, ``(E,)`` int64."""
    # Not bincount, which reads the largest id on the host.
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    return counts_E.index_add_(0, expert_N, torch.ones_like(expert_N, dtype=torch.int64))


def permute_reference(x_TD: Tensor, routed: SortedTokens) -> Tensor:
    """Return ``(N, D)``: for every routed token, the vector of its token."""
    return x_TD[routed.token_N]


def combine_reference(y_ND: Tensor, weights_TA: Tensor, routed: SortedTokens) -> Tensor:
    """Return ``(T, D)``: the weighted sum of each token's rows, added in fp32, in the dtype of ``y_ND``."""
    weighted_TAD = y_ND[routed.row_TA] * _weights_within(weights_TA, routed)[..., None]
    return weighted_TAD.sum(1).to(y_ND.dtype)


def permute(x_TD: Tensor, routed: SortedTokens, *, by: CombineRows = TORCH) -> Tensor:
    """Compute ``permute_reference``; its backward sums the rows of each token with ``by``."""
    return _Permute.apply(x_TD, routed.token_N, routed.row_TA, routed.within_TA, by)


def combine(y_ND: Tensor, weights_TA: Tensor, routed: SortedTokens, *, by: CombineRows = TORCH) -> Tensor:
    """Compute ``combine_reference`` with ``by``."""
    return combine_rows(y_ND, _weights_within(weights_TA, routed), routed.row_TA, routed.slot_N, by=by)


def _weights_within(weights_TA: Tensor, routed: SortedTokens) -> Tensor:
    # A dropped pair has row_TA 0, which is the row of another pair: its weight must be 0.
    return weights_TA if routed.within_TA is None else weights_TA * routed.within_TA


class RoutedTokens(Protocol):
    """The fields of sorted routed tokens that a MoE layer reads; int64 or int32, sorted by expert, then by token."""

    @property
    def token_N(self) -> Tensor:
        """The token of each row."""

    @property
    def expert_N(self) -> Tensor:
        """The expert of each row, ascending."""

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """An expert without tokens has 0."""


@dataclass(frozen=True)
class Permutation:
    """The three functions that take tokens to rows sorted by expert and the experts' outputs back to the tokens.

    ``sort(expert_ids_TA, num_experts, within_TA) -> RoutedTokens`` finds the order. It leaves out the pairs of which
    ``within_TA`` (bool, or None without a capacity) is false. An implementation may return further fields, which only
    its own ``permute`` and ``combine`` read.
    ``permute(x_TD, routed) -> (N, D)`` and ``combine(y_ND, weights_TA, routed) -> (T, D)`` compute
    ``permute_reference`` and ``combine_reference``.
    """

    sort: Callable[[Tensor, int, Tensor | None], RoutedTokens]
    permute: Callable[[Tensor, Any], Tensor]
    combine: Callable[[Tensor, Tensor, Any], Tensor]


GATHERS = Permutation(sort_by_expert, permute, combine)
"""The implementation in stock PyTorch, which runs on any device."""
ONE_PASS_GATHERS = {
    by.name: Permutation(sort_by_expert, partial(permute, by=by), partial(combine, by=by)) for by in (NATIVE, TRITON)
}
"""The same with a combine that passes over memory once, by the name of its implementation."""


class TokenCounts:
    """Number of routed tokens per expert in the forms that matrix products need, each made at most once per layer."""

    def __init__(self, tokens_per_expert_E: Tensor) -> None:
        self.tokens_per_expert_E = tokens_per_expert_E

    @cached_property
    def ends_E(self) -> Tensor:
        """Exclusive end of each expert's rows: int32, as grouped_mm takes them, on the device of the counts."""
        return self.tokens_per_expert_E.cumsum(0, dtype=torch.int32)

    @cached_property
    def on_host(self) -> Tensor:
        """The counts as int64 in host memory. The first use waits for the device."""
        return self.tokens_per_expert_E.to("cpu", torch.int64)

    @cached_property
    def as_list(self) -> list[int]:
        """The counts as a list. The first use waits for the device."""
        return self.on_host.tolist()


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_N: Tensor, row_TA: Tensor, within_TA: Tensor | None, by: CombineRows
    ) -> Tensor:
        ctx.save_for_backward(row_TA, within_TA)
        ctx.by = by
        # PyTorch's own backward of index_select is a scatter-add, whose order of additions is not fixed on a GPU.
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None, None]:
        row_TA, within_TA = ctx.saved_tensors
        # A dropped pair has no gradient, and the others are added in fp32, as in combine.
        wide = torch.promote_types(grad_ND.dtype, torch.float32)
        weights_TA = None if within_TA is None else within_TA.to(wide)
        return ctx.by.forward(grad_ND, row_TA, weights_TA), None, None, None, None
