"""The process groups of expert parallelism, in the order that DeepSpeed uses."""

from __future__ import annotations

import torch.distributed as dist

from qsparse_moe.moe.expert_group import ALONE, ExpertGroup
from qsparse_moe.training.distributed.ranks import Distributed


def join_expert_group(size: int, distributed: Distributed) -> ExpertGroup:
    """Create this rank's group of ``size`` consecutive ranks, which together hold every expert once.

    Ranks at the same index of their groups hold the same experts; they form an expert data-parallel group. All ranks
    must call this function.
    """
    if size == 1:
        return ALONE
    ranks = range(distributed.world_size)
    # Consecutive ranks are on one machine if it has enough of them, and the all-to-all then stays inside it.
    members, _ = dist.new_subgroups_by_enumeration([list(ranks[first : first + size]) for first in ranks[::size]])
    data_parallel, _ = dist.new_subgroups_by_enumeration([list(ranks[index::size]) for index in range(size)])
    return ExpertGroup(distributed.rank % size, size, members, data_parallel)
