"""The process groups of expert parallelism, as they are asked for; real ones are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.moe.expert_group import ALONE
from qsparse_moe.training.distributed import expert_groups
from qsparse_moe.training.distributed.expert_groups import join_expert_group
from qsparse_moe.training.distributed.ranks import Distributed


@pytest.mark.parametrize(("rank", "at"), [(0, 0), (4, 1), (5, 2)])
def test_consecutive_ranks_share_the_experts_and_the_same_place_of_each_group_holds_the_same(rank, at, monkeypatch):
    asked = []

    def made(ranks):
        asked.append(ranks)
        return f"group {len(asked)}", None

    monkeypatch.setattr(expert_groups.dist, "new_subgroups_by_enumeration", made)
    group = join_expert_group(3, Distributed(rank, 6, rank, torch.device("cpu")))
    assert asked == [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]]
    assert (group.rank, group.size, group.members, group.data_parallel) == (at, 3, "group 1", "group 2")


def test_a_rank_with_all_experts_asks_for_no_group(monkeypatch):
    monkeypatch.setattr(expert_groups.dist, "new_subgroups_by_enumeration", None)
    assert join_expert_group(1, Distributed(3, 6, 3, torch.device("cpu"))) is ALONE
