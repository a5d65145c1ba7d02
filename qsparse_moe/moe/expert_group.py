"""Expert parallelism: the ranks that share the experts of every layer, and the shard of each. E experts, P ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertGroup:
    """This rank among the P that share the experts: rank r holds the r-th E / P experts of every layer."""

    rank: int = 0
    size: int = 1
    members: dist.ProcessGroup | None = None
    """The process group of the P ranks; None if this rank holds all experts."""
    data_parallel: dist.ProcessGroup | None = None
    """The expert data-parallel group: the ranks that hold the same experts, over which their gradients are reduced."""

    def num_local(self, num_experts: int) -> int:
        """Return the number of experts per layer that this rank holds."""
        assert num_experts % self.size == 0, f"{num_experts} experts do not divide over {self.size} ranks"
        return num_experts // self.size


ALONE = ExpertGroup()
"""The group of a rank that holds all experts."""


def shard_over(parameter: nn.Parameter, group: ExpertGroup) -> None:
    """Tag stacked matrices as this rank's shard of the global ones; engines and checkpoints read the tag."""
    if group.size > 1:
        parameter.expert_group = group  # type: ignore[attr-defined]


def expert_group(parameter: Tensor) -> ExpertGroup:
    """Return the ranks over which a parameter is sharded; ``ALONE`` if every rank holds all of it."""
    return getattr(parameter, "expert_group", ALONE)


def global_shape(parameter: Tensor, shape: torch.Size | None = None) -> torch.Size:
    """Return the global shape of a parameter.

    Args:
        parameter: the local shard with its tag.
        shape: the shape of the local shard if the parameter itself is empty, as under ZeRO-3; None is its own shape.
    """
    shape = parameter.shape if shape is None else shape
    # The experts are the first dim of every stacked matrix, and only that dim is sharded.
    size = expert_group(parameter).size
    return shape if size == 1 else torch.Size((shape[0] * size, *shape[1:]))
