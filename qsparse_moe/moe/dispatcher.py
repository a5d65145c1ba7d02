"""Dispatch of routed tokens to the ranks that hold their experts, and the return of the experts' outputs.

N routed tokens of this rank and M that it receives, each sorted by expert; D width, E experts, P ranks of which each
holds L experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qsparse_moe.moe.expert_group import ExpertGroup


class ExpertTokens(NamedTuple):
    """Routed tokens sorted by expert: those of this rank before the dispatch, those of its experts after it."""

    x_MD: Tensor
    """Sorted by expert; after the dispatch, those of one expert are in the order of the ranks that sent them."""
    tokens_per_expert_L: Tensor
    """Number of tokens per expert: of all E experts before the dispatch, of this rank's L experts after it."""
    expert_M: Tensor
    """The expert of each routed token, numbered among all E."""
    continues_M: Tensor | None
    """Bool: whether the next one is the next token of the same sequence and has the same expert and source rank. None
    if the statistics of this step are not recorded."""


class Dispatcher(Protocol):
    """Routed tokens that are being sent to their experts."""

    def receive(self) -> ExpertTokens:
        """Wait for the tokens of this rank's experts and return them."""

    def combine(self, y_MD: Tensor) -> Tensor:
        """Send the experts' outputs back; return ``(N, D)``, those of this rank's tokens, in their original order."""


def start_dispatch(routed: ExpertTokens, group: ExpertGroup) -> Dispatcher:
    """Start to send every routed token to the rank that holds its expert.

    What is computed between this call and ``receive`` overlaps with the transfer. All ranks of the group must call it;
    each may have any number of routed tokens, including none.
    """
    return _LocalDispatcher(routed) if group.size == 1 else _AllToAllDispatcher(routed, group)


def dispatch_reference(x_by_rank: Sequence[Tensor], counts_by_rank: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the tokens that each rank receives, computed from those of all ranks: the definition of the dispatch.

    Args:
        x_by_rank: ``(N, D)`` of each of the P ranks, sorted by expert; N may differ between ranks.
        counts_by_rank: for each rank, the number of routed tokens of each of the E experts.
    """
    num_ranks, num_experts = len(x_by_rank), len(counts_by_rank[0])
    parts = [x_ND.split(list(counts)) for x_ND, counts in zip(x_by_rank, counts_by_rank, strict=True)]
    by_expert = [torch.cat([part[expert] for part in parts]) for expert in range(num_experts)]
    local = num_experts // num_ranks
    return [torch.cat(by_expert[rank * local : (rank + 1) * local]) for rank in range(num_ranks)]


class _LocalDispatcher:
    """Nothing is sent: this rank holds all experts."""

    def __init__(self, routed: ExpertTokens) -> None:
        self._routed = routed

    def receive(self) -> ExpertTokens:
        return self._routed

    def combine(self, y_MD: Tensor) -> Tensor:
        return y_MD


class _AllToAllDispatcher:
    """Routed tokens go to the ranks of their experts, and the outputs come back, by all-to-all collectives."""

    def __init__(self, routed: ExpertTokens, group: ExpertGroup) -> None:
        send_PL = routed.tokens_per_expert_L.long().view(group.size, -1)
        # The counts go first, because the tokens need receive buffers of the right sizes.
        receive_PL = torch.empty_like(send_PL)
        dist.all_to_all_single(receive_PL, send_PL, group=group.members)
        # all_to_all_single takes its split sizes on the host: the only point where a layer waits for the device.
        send_sizes, receive_sizes = torch.stack((send_PL, receive_PL)).sum(-1).tolist()
        self._tokens_per_expert_L = receive_PL.sum(0)
        self._expert_M, self._order_M = _sort_by_expert(receive_PL, sum(receive_sizes), group.rank)
        self._to_experts = _Transfer(send_sizes, receive_sizes, group)
        self._to_tokens = _Transfer(receive_sizes, send_sizes, group)
        # Before the tokens: a transfer tracks one collective at a time, and that of the flags ends here.
        self._continues_M = None if routed.continues_M is None else self._dispatch_flags(routed.continues_M)
        self._pending = _Send.apply(routed.x_MD, self._to_experts)

    def _dispatch_flags(self, flag_N: Tensor) -> Tensor:
        # Sent as bytes, because not every communication backend supports bool.
        self._to_experts.start(flag_N.byte(), self._to_experts.send_sizes, self._to_experts.receive_sizes)
        return self._to_experts.finish().bool()[self._order_M]

    def receive(self) -> ExpertTokens:
        received_MD = _Receive.apply(self._pending, self._to_experts)
        self._position_M = _inverse(self._order_M)
        # Backends expect the tokens of an expert to be contiguous; they arrive contiguous per source rank.
        x_MD = _Reorder.apply(received_MD, self._order_M, self._position_M)
        return ExpertTokens(x_MD, self._tokens_per_expert_L, self._expert_M, self._continues_M)

    def combine(self, y_MD: Tensor) -> Tensor:
        as_received_MD = _Reorder.apply(y_MD, self._position_M, self._order_M)
        return _Receive.apply(_Send.apply(as_received_MD, self._to_tokens), self._to_tokens)


def _sort_by_expert(receive_PL: Tensor, num_received: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the expert of every token once they are sorted by expert, and the position at which each was received.

    Tokens are received in the order of the source ranks, and those of one rank in the order of the experts.
    """
    num_ranks, num_local = receive_PL.shape
    expert_L = torch.arange(rank * num_local, (rank + 1) * num_local, device=receive_PL.device)
    # output_size spares repeat_interleave from reading the counts on the device.
    as_received_M = expert_L.repeat(num_ranks).repeat_interleave(receive_PL.flatten(), output_size=num_received)
    # Stable, so that within an expert the order of the source ranks remains and every run adds in the same order.
    return as_received_M.sort(stable=True)


def _inverse(order_M: Tensor) -> Tensor:
    # A scatter is linear in the number of tokens; an argsort is not.
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))


class _Transfer:
    """One all-to-all in the forward pass and its mirror image in the backward pass, both asynchronous."""

    def __init__(self, send_sizes: list[int], receive_sizes: list[int], group: ExpertGroup) -> None:
        self.send_sizes, self.receive_sizes, self._members = send_sizes, receive_sizes, group.members
        self._started: tuple[dist.Work, Tensor] | None = None

    def start(self, x: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        """Start the transfer and return its receive buffer, which must not be read before ``finish``."""
        buffer = x.new_empty(sum(receive_sizes), *x.shape[1:])
        work = dist.all_to_all_single(
            buffer, x.contiguous(), receive_sizes, send_sizes, group=self._members, async_op=True
        )
        self._started = (work, buffer)
        return buffer

    def finish(self) -> Tensor:
        """Wait for the transfer and return the received tensor."""
        assert self._started is not None, "a transfer is finished that was not started"
        work, buffer = self._started
        # Cleared, so that a second finish fails instead of returning an old buffer.
        self._started = None
        work.wait()
        return buffer


class _Send(torch.autograd.Function):
    """Start a transfer; the backward receives the gradient that the backward of ``_Receive`` has sent.

    The gradient is taken from the transfer and not from autograd, which would expect the shape of the received tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(x, transfer.send_sizes, transfer.receive_sizes)

    @staticmethod
    def backward(ctx: Any, unused: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish().view_as(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start(grad, ctx.transfer.receive_sizes, ctx.transfer.send_sizes)
        # Autograd needs some gradient to call the backward of _Send, which ignores it.
        return grad, None


class _Reorder(torch.autograd.Function):
    """``x[order]``, with a backward that gathers by the inverse order."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, inverse_M), None, None
