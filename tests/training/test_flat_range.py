"""Ranges of flattened tensors: the parts of replicas and of ZeRO-3, and the experts of a rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsparse_moe.moe.expert_group import ExpertGroup, shard_over
from qsparse_moe.training.flat_range import FlatRange, shard_range


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_parts_follow_each_other_and_differ_by_one_element(count):
    parts = [FlatRange(4, 18).part(index, count) for index in range(count)]
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (4, 18)
    assert {len(part) for part in parts} <= {14 // count, 14 // count + 1}


def test_parts_of_one_size_end_with_shorter_and_empty_ones():
    parts = [FlatRange(0, 14).part_of_size(5, index) for index in range(5)]
    assert [(part.start, part.stop) for part in parts] == [(0, 5), (5, 10), (10, 14), (14, 14), (14, 14)]
    assert FlatRange(3, 5).moved(14) == FlatRange(17, 19)


@pytest.mark.parametrize(("rank", "found"), [(0, (0, 40)), (1, (40, 80)), (2, (80, 120))])
def test_the_experts_of_a_rank_are_one_range(rank, found):
    experts, shared = nn.Parameter(torch.zeros(2, 4, 5)), nn.Parameter(torch.zeros(7))
    shard_over(experts, ExpertGroup(rank=rank, size=3))
    part = shard_range(experts, 120)
    whole = torch.arange(120).view(6, 4, 5)
    assert (part.start, part.stop) == found
    assert whole.flatten()[part.start : part.stop].equal(whole[2 * rank : 2 * rank + 2].flatten())
    assert shard_range(shared, 7) == FlatRange(0, 7)
