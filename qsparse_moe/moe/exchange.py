"""Rows that travel to the ranks of their experts, and their results that travel back.

N rows of this rank and M that arrive at it, each sorted by expert; D width, E experts, P ranks of which each holds L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from qsparse_moe.moe.expert_group import ExpertGroup


class ExpertRows(NamedTuple):
    """Rows for experts: before the exchange those of this rank's tokens, after it those for this rank's experts."""

    rows_MD: Tensor
    """Sorted by expert; after the exchange within an expert by the rank that they come from."""
    rows_per_expert_L: Tensor
    """Of all E experts before the exchange, of this rank's after it."""
    expert_M: Tensor
    """The expert of each row, counted among all E."""
    continues_M: Tensor | None
    """bool, of every row something that holds for it and the next row of the same rank and expert: False in the last.
    None where nobody asks."""


class Journey(Protocol):
    """Rows on their way to their experts since it was made."""

    def arrive(self) -> ExpertRows:
        """Wait for the rows that are for this rank's experts."""

    def bring_back(self, y_MD: Tensor) -> Tensor:
        """``(N, D)``: what the experts made of this rank's own rows, in the order in which they left."""


def depart(rows: ExpertRows, group: ExpertGroup) -> Journey:
    """Send every row to the rank that holds its expert; what is computed before ``arrive`` overlaps with the way.

    All ranks of the group call it together; each may have any number of rows, none included.
    """
    return _AtHome(rows) if group.size == 1 else _Abroad(rows, group)


def exchange_reference(rows_by_rank: Sequence[Tensor], counts_by_rank: Sequence[Sequence[int]]) -> list[Tensor]:
    """What arrives at every rank, from all ranks' rows at once: the definition of ``depart`` and ``arrive``.

    Args:
        rows_by_rank: ``(N, D)`` of each of the P ranks, sorted by expert; N may differ.
        counts_by_rank: for each rank the rows of each of the E experts.
    """
    num_ranks, num_experts = len(rows_by_rank), len(counts_by_rank[0])
    parts = [rows.split(list(counts)) for rows, counts in zip(rows_by_rank, counts_by_rank, strict=True)]
    by_expert = [torch.cat([part[expert] for part in parts]) for expert in range(num_experts)]
    local = num_experts // num_ranks
    return [torch.cat(by_expert[rank * local : (rank + 1) * local]) for rank in range(num_ranks)]


class _AtHome:
    """No way to go: this rank holds all experts."""

    def __init__(self, rows: ExpertRows) -> None:
        self._rows = rows

    def arrive(self) -> ExpertRows:
        return self._rows

    def bring_back(self, y_MD: Tensor) -> Tensor:
        return y_MD


class _Abroad:
    def __init__(self, rows: ExpertRows, group: ExpertGroup) -> None:
        leaving_PL = rows.rows_per_expert_L.long().view(group.size, -1)
        arriving_PL = torch.empty_like(leaving_PL)
        dist.all_to_all_single(arriving_PL, leaving_PL, group=group.members)
        # A transfer is described on the host: the one place where a layer waits for its counts.
        leaving, arriving = torch.stack((leaving_PL, arriving_PL)).sum(-1).tolist()
        self._rows_per_expert_L = arriving_PL.sum(0)
        self._expert_M, self._order_M = _by_expert(arriving_PL, sum(arriving), group.rank)
        self._outward = _Transfer(leaving, arriving, group)
        self._homeward = _Transfer(arriving, leaving, group)
        self._continues_M = None if rows.continues_M is None else self._exchange_flags(rows.continues_M)
        self._under_way = _Send.apply(rows.rows_MD, self._outward)

    def _exchange_flags(self, flag_N: Tensor) -> Tensor:
        self._outward.start(flag_N.byte(), self._outward.leaving, self._outward.arriving)
        return self._outward.finish().bool()[self._order_M]

    def arrive(self) -> ExpertRows:
        landed_MD = _Receive.apply(self._under_way, self._outward)
        self._position_M = _inverse(self._order_M)
        rows_MD = _Reorder.apply(landed_MD, self._order_M, self._position_M)
        return ExpertRows(rows_MD, self._rows_per_expert_L, self._expert_M, self._continues_M)

    def bring_back(self, y_MD: Tensor) -> Tensor:
        as_landed_MD = _Reorder.apply(y_MD, self._position_M, self._order_M)
        return _Receive.apply(_Send.apply(as_landed_MD, self._homeward), self._homeward)


def _by_expert(arriving_PL: Tensor, num_rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """The expert of every row once they are sorted by expert, and at which place of arrival each then stands.

    Rows arrive by the rank that they come from, and of one rank by expert.
    """
    num_ranks, num_local = arriving_PL.shape
    expert_L = torch.arange(rank * num_local, (rank + 1) * num_local, device=arriving_PL.device)
    as_landed_M = expert_L.repeat(num_ranks).repeat_interleave(arriving_PL.flatten(), output_size=num_rows)
    return as_landed_M.sort(stable=True)


def _inverse(order_M: Tensor) -> Tensor:
    return torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))


class _Transfer:
    """One all-to-all forward and its mirror image backward; each is started, and waited for where it is needed."""

    def __init__(self, leaving: list[int], arriving: list[int], group: ExpertGroup) -> None:
        self.leaving, self.arriving, self._members = leaving, arriving, group.members
        self._started: tuple[dist.Work, Tensor] | None = None

    def start(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """Where rows will arrive: not to be read before ``finish``."""
        landing = rows.new_empty(sum(arriving), *rows.shape[1:])
        work = dist.all_to_all_single(landing, rows.contiguous(), arriving, leaving, group=self._members, async_op=True)
        self._started = (work, landing)
        return landing

    def finish(self) -> Tensor:
        """What has arrived."""
        assert self._started is not None, "rows are received that were not sent"
        work, landing = self._started
        self._started = None
        work.wait()
        return landing


class _Send(torch.autograd.Function):
    """The backward receives the gradient that ``_Receive``'s backward sent.

    It comes through the transfer: autograd itself would want it in the shape of the rows that had arrived.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows, transfer.leaving, transfer.arriving)

    @staticmethod
    def backward(ctx: Any, unused: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish().view_as(under_way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start(grad, ctx.transfer.arriving, ctx.transfer.leaving)
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
