"""The groups of ranks that expert parallelism makes, in the order in which DeepSpeed lays them out."""

from __future__ import annotations

import torch.distributed as dist

from qsparse_moe.moe.expert_group import ALONE, ExpertGroup
from qsparse_moe.training.distributed.ranks import Distributed


def join_expert_group(size: int, distributed: Distributed) -> ExpertGroup:
    """This rank's group of ``size`` consecutive ranks, which hold every expert once. All ranks call it.

    Consecutive, so that the rows of a group travel inside a machine where it has enough ranks. Ranks of the same place
    in their groups hold the same experts and are each other's replicas.
    """
    if size == 1:
        return ALONE
    ranks = range(distributed.world_size)
    members, _ = dist.new_subgroups_by_enumeration([list(ranks[first : first + size]) for first in ranks[::size]])
    data_parallel, _ = dist.new_subgroups_by_enumeration([list(ranks[place::size]) for place in range(size)])
    return ExpertGroup(distributed.rank % size, size, members, data_parallel)
