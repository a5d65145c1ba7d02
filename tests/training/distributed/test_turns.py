"""Ranks that take batches in turn, against turns written out by hand."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed
from qsparse_moe.training.distributed.turns import gather_in_order, turns


def rank_of(rank, world_size, gathered=None):
    class Rank(Distributed):
        def all_gather(self, value):
            return gathered

    return Rank(rank, world_size, rank, torch.device("cpu"))


@pytest.mark.parametrize(
    ("rank", "want"),
    [
        (0, [(0, False), (3, False)]),
        (1, [(1, False), (4, False)]),
        (2, [(2, False), (0, True)]),
    ],
)
def test_five_batches_on_three_ranks_take_two_turns_and_one_spare_batch(rank, want):
    assert [(turn.index, turn.is_spare) for turn in turns(5, rank_of(rank, 3))] == want


def test_more_ranks_than_batches_all_have_one_turn_and_no_batch_makes_none():
    assert [[(turn.index, turn.is_spare) for turn in turns(1, rank_of(rank, 3))] for rank in range(3)] == [
        [(0, False)],
        [(0, True)],
        [(0, True)],
    ]
    assert list(turns(0, rank_of(1, 3))) == []
    assert [(turn.index, turn.is_spare, turn.gather("x")) for turn in turns(2, ONE_RANK)] == [
        (0, False, ["x"]),
        (1, False, ["x"]),
    ]


def test_values_are_gathered_in_the_order_of_batches_without_those_of_spare_ones():
    ranks = rank_of(1, 3, gathered=["a", "b", "spare"])
    first, last = turns(5, ranks)
    assert first.gather("b") == ["a", "b", "spare"] and last.gather("b") == ["a", "b"]
    by_rank = [["0", "3"], ["1", "4"], ["2", "spare"]]
    assert gather_in_order(["1", "4"], 5, rank_of(1, 3, by_rank)) == list("01234")
