"""The shard of a rank among those that share the experts: which experts, and the global shape. Nothing is started."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsparse_moe.model.init import fill_range
from qsparse_moe.moe.expert_group import (
    ALONE,
    ExpertGroup,
    expert_group,
    global_shape,
    shard_over,
)


class Indices:
    """A source of weights, each of which is its index in the flattened global parameter."""

    def fill(self, name, start, out):
        out.copy_(torch.arange(start, start + len(out)))


def filled(parameter):
    fill_range(Indices(), "w", parameter, parameter.detach().view(-1), 0)
    return parameter.detach()


@pytest.mark.parametrize(("rank", "experts"), [(0, [0, 1]), (1, [2, 3]), (2, [4, 5])])
def test_a_rank_holds_consecutive_experts_of_the_first_dim(rank, experts):
    group = ExpertGroup(rank=rank, size=3)
    parameter = nn.Parameter(torch.zeros(2, 4, 5))
    shard_over(parameter, group)
    assert expert_group(parameter) is group and group.num_local(6) == 2
    assert global_shape(parameter) == (6, 4, 5)
    # Under ZeRO-3 the parameter itself is empty.
    assert global_shape(parameter, torch.Size((7, 2))) == (21, 2)
    assert filled(parameter)[:, 0, 0].tolist() == [20 * expert for expert in experts]
    assert filled(parameter)[1, 3, 4] == 20 * experts[1] + 19


def test_a_rank_alone_holds_everything():
    parameter = nn.Parameter(torch.zeros(6, 4))
    shard_over(parameter, ExpertGroup(rank=0, size=1))
    assert expert_group(parameter) is ALONE and not hasattr(parameter, "expert_group")
    assert global_shape(parameter) == (6, 4) and filled(parameter).flatten().tolist() == [*range(24)]
    assert ALONE.num_local(6) == 6


def test_experts_that_do_not_divide_are_an_internal_error():
    with pytest.raises(AssertionError, match="7 experts do not divide over 3 ranks"):
        ExpertGroup(rank=0, size=3).num_local(7)


def test_two_ranks_already_share_the_experts():
    parameter = nn.Parameter(torch.zeros(2, 4))
    shard_over(parameter, ExpertGroup(rank=1, size=2))
    assert global_shape(parameter) == (4, 4) and filled(parameter)[:, 0].tolist() == [8, 12]
