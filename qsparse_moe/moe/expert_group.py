"""The ranks that hold the experts of every layer between them, and what each of them holds. E experts, P ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertGroup:
    """This rank among the P that share the experts: number ``rank`` holds the ``rank``-th E / P of every layer's."""

    rank: int = 0
    size: int = 1
    members: dist.ProcessGroup | None = None
    """The P ranks; None where one holds all experts."""
    replicas: dist.ProcessGroup | None = None
    """The ranks that hold the same experts as this one, for whoever adds up their gradients."""

    def num_local(self, num_experts: int) -> int:
        """How many of a layer's experts this rank holds."""
        assert num_experts % self.size == 0, f"{num_experts} experts do not divide over {self.size} ranks"
        return num_experts // self.size


ALONE = ExpertGroup()


def shard_over(parameter: nn.Parameter, group: ExpertGroup) -> None:
    """Mark stacked matrices as this rank's share of the whole ones: the tag that engines and checkpoints read."""
    if group.size > 1:
        parameter.expert_group = group  # type: ignore[attr-defined]


def expert_group(parameter: Tensor) -> ExpertGroup:
    """Over which ranks a parameter is spread; ``ALONE`` for one that every rank holds whole."""
    return getattr(parameter, "expert_group", ALONE)


def global_shape(parameter: Tensor, shape: torch.Size | None = None) -> torch.Size:
    """The shape of the whole parameter.

    Args:
        parameter: with its tag.
        shape: of what this rank holds, where the parameter itself is empty (ZeRO-3); None takes the parameter's.
    """
    shape = parameter.shape if shape is None else shape
    size = expert_group(parameter).size
    return shape if size == 1 else torch.Size((shape[0] * size, *shape[1:]))


def local_shard(parameter: Tensor, whole: Tensor) -> Tensor:
    """What this rank holds of a tensor that is shaped as the whole parameter: a view."""
    group = expert_group(parameter)
    return whole if group.size == 1 else whole.chunk(group.size)[group.rank]


def all_gather_shards(parameter: Tensor, share: Tensor) -> Tensor:
    """The whole of which every rank holds a share like ``share``. All ranks call it."""
    group = expert_group(parameter)
    if group.size == 1:
        return share
    whole = share.new_empty(group.size * len(share), *share.shape[1:])
    dist.all_gather(list(whole.chunk(group.size)), share.contiguous(), group=group.members)
    return whole
