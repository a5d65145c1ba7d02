"""Tokens to rows sorted by expert, and back. T tokens, A experts a token, N = T * A rows, D width, E experts.

Both directions are gathers, forward and backward: no scatter-add, so no result depends on an order of additions. Where
an expert's capacity drops choices there are fewer rows; a dropped choice adds nothing to its token in either direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qsparse_moe.kernels.combine_rows.op import NATIVE, TORCH, TRITON, CombineRows, combine_rows


class Dispatch(NamedTuple):
    """Where every routed row comes from and goes to; rows are sorted by expert, within an expert by token."""

    token_N: Tensor
    """The token of each row."""
    slot_N: Tensor
    """The (token, choice) pair of each row, as ``token * A + choice``."""
    row_TA: Tensor
    """The row of each (token, choice) pair: the inverse of ``slot_N``. Of a dropped one it is 0 and means nothing."""
    expert_N: Tensor
    """The expert of each row, ascending."""
    rows_per_expert_E: Tensor
    """int64; an expert without rows has 0."""
    kept_TA: Tensor | None
    """False where a (token, choice) pair was dropped; None where none can be."""


def plan_dispatch(expert_ids_TA: Tensor, num_experts: int, kept_TA: Tensor | None = None) -> Dispatch:
    """Sort the chosen (token, expert) pairs by expert, stably.

    Nothing is copied to the host, unless ``kept_TA`` drops pairs: then their number is.
    """
    flat_ids = expert_ids_TA.flatten()
    expert_N, slot_N = flat_ids.sort(stable=True)
    if kept_TA is not None:
        kept_N = kept_TA.flatten()[slot_N]
        expert_N, slot_N = expert_N[kept_N], slot_N[kept_N]
    positions = torch.arange(len(slot_N), device=flat_ids.device)
    row_TA = torch.zeros_like(flat_ids).scatter_(0, slot_N, positions).view_as(expert_ids_TA)
    token_N = slot_N.div(expert_ids_TA.shape[1], rounding_mode="floor")
    return Dispatch(token_N, slot_N, row_TA, expert_N, _counts(expert_N, num_experts), kept_TA)


def _counts(expert_N: Tensor, num_experts: int) -> Tensor:
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    return counts_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))


def permute_reference(x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """``(N, D)``: the row of the token of every routed row."""
    return x_TD[dispatch.token_N]


def combine_reference(y_ND: Tensor, weights_TA: Tensor, dispatch: Dispatch) -> Tensor:
    """``(T, D)``: each token's rows, weighted and added in fp32, in the dtype of ``y_ND``."""
    weighted_TAD = y_ND[dispatch.row_TA] * _kept_weights(weights_TA, dispatch)[..., None]
    return weighted_TAD.sum(1).to(y_ND.dtype)


def permute(x_TD: Tensor, dispatch: Dispatch, *, by: CombineRows = TORCH) -> Tensor:
    """``permute_reference``; the backward adds up each token's rows by ``by``."""
    return _Permute.apply(x_TD, dispatch.token_N, dispatch.row_TA, dispatch.kept_TA, by)


def combine(y_ND: Tensor, weights_TA: Tensor, dispatch: Dispatch, *, by: CombineRows = TORCH) -> Tensor:
    """``combine_reference`` computed by ``by``."""
    return combine_rows(y_ND, _kept_weights(weights_TA, dispatch), dispatch.row_TA, dispatch.slot_N, by=by)


def _kept_weights(weights_TA: Tensor, dispatch: Dispatch) -> Tensor:
    return weights_TA if dispatch.kept_TA is None else weights_TA * dispatch.kept_TA


class RoutedRows(Protocol):
    """What every plan tells of the rows, which are sorted by expert, within an expert by token; int64 or int32."""

    @property
    def token_N(self) -> Tensor:
        """The token of each row."""

    @property
    def expert_N(self) -> Tensor:
        """The expert of each row, ascending."""

    @property
    def rows_per_expert_E(self) -> Tensor:
        """An expert without rows has 0."""


@dataclass(frozen=True)
class Permutation:
    """The way from tokens to rows and back: ``plan`` finds it, ``permute`` and ``combine`` go it.

    ``plan(expert_ids_TA, num_experts, kept_TA)`` copies nothing to the host unless ``kept_TA``, bool, drops pairs; of
    what it returns only ``RoutedRows`` is known.
    ``permute(x_TD, planned) -> (N, D)`` and ``combine(y_ND, weights_TA, planned) -> (T, D)`` agree with
    ``permute_reference`` and ``combine_reference``.
    """

    plan: Callable[[Tensor, int, Tensor | None], RoutedRows]
    permute: Callable[[Tensor, Any], Tensor]
    combine: Callable[[Tensor, Tensor, Any], Tensor]


GATHERS = Permutation(plan_dispatch, permute, combine)
"""Stock PyTorch, on any device."""
ONE_PASS_GATHERS = {
    by.name: Permutation(plan_dispatch, partial(permute, by=by), partial(combine, by=by)) for by in (NATIVE, TRITON)
}
"""The same with the way back in one pass over memory, by the name of its implementation."""


class RowCounts:
    """How many rows each expert has, in the forms that grouped products want; each is made at most once a layer."""

    def __init__(self, rows_per_expert_E: Tensor) -> None:
        self.rows_per_expert_E = rows_per_expert_E

    @cached_property
    def ends_E(self) -> Tensor:
        """int32, on the rows' device: the row behind each expert's last."""
        return self.rows_per_expert_E.cumsum(0, dtype=torch.int32)

    @cached_property
    def on_host(self) -> Tensor:
        """int64, in the host's memory. The first use waits for the device."""
        return self.rows_per_expert_E.to("cpu", torch.int64)

    @cached_property
    def as_list(self) -> list[int]:
        """The numbers. The first use waits for the device."""
        return self.on_host.tolist()


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_N: Tensor, row_TA: Tensor, kept_TA: Tensor | None, by: CombineRows
    ) -> Tensor:
        ctx.save_for_backward(row_TA, kept_TA)
        ctx.by = by
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None, None]:
        row_TA, kept_TA = ctx.saved_tensors
        wide = torch.promote_types(grad_ND.dtype, torch.float32)
        weights_TA = None if kept_TA is None else kept_TA.to(wide)
        return ctx.by.forward(grad_ND, row_TA, weights_TA), None, None, None, None
