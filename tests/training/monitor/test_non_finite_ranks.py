"""The guard names the lowest rank that has found a bad value; the reduction over ranks is written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard


class Ranks(Distributed):
    """One of three ranks; the others contribute ``others`` to every reduction."""

    others: Tensor

    def all_reduce(self, tensor, op=None, *, group=None):
        assert op == torch.distributed.ReduceOp.MAX
        return torch.maximum(tensor, self.others.to(tensor.dtype))


def one_of_three(rank: int, others: list[int]) -> NonFiniteGuard:
    """Make a guard of two layers; ``others``: flags of layers 0, 1, of their gradients, of the loss, stop, and save."""
    distributed = Ranks(rank=rank, world_size=3, local_rank=rank, device=torch.device("cpu"))
    object.__setattr__(distributed, "others", torch.tensor(others))
    return NonFiniteGuard(2, distributed)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_alone_finds_a_bad_value_is_named(rank):
    guard = one_of_three(rank, [0, 0, 0, 0, 0, 0, 0])
    guard.layer_hook(1, torch.tensor([float("nan")]))
    with pytest.raises(TrainingDiverged, match=f"step 4: the output of layer 1 is not finite on rank {rank}\\."):
        guard.check(4, stop=0)


def test_of_several_ranks_the_lowest_is_named():
    # Rank 2 finds a bad output of layer 1 itself; rank 0 reports 3 for the same layer, rank 1 would report 2.
    guard = one_of_three(2, [0, 3, 0, 0, 0, 0, 0])
    guard.layer_hook(1, torch.tensor([float("nan")]))
    with pytest.raises(TrainingDiverged, match=r"the output of layer 1 is not finite on rank 0\."):
        guard.check(1, stop=0)


def test_the_highest_signal_of_all_ranks_is_returned():
    assert one_of_three(1, [0, 0, 0, 0, 0, 15, 0]).check(1, stop=2).stop == 15
    assert one_of_three(1, [0, 0, 0, 0, 0, 2, 0]).check(1, stop=15).stop == 15


def test_a_request_of_any_rank_saves_on_all():
    assert one_of_three(1, [0, 0, 0, 0, 0, 0, 1]).check(1, stop=0) == (0, True)
    assert one_of_three(1, [0, 0, 0, 0, 0, 0, 0]).check(1, stop=0, save=True) == (0, True)
    assert one_of_three(1, [0, 0, 0, 0, 0, 9, 0]).check(1, stop=0) == (9, False)


def test_a_bad_loss_of_an_earlier_step_is_forgotten():
    guard = one_of_three(1, [0, 0, 0, 0, 0, 0, 0])
    guard.add_loss(torch.tensor(float("inf")))
    with pytest.raises(TrainingDiverged, match=r"the loss is not finite on rank 1\."):
        guard.check(1, stop=0)
    guard.add_loss(torch.tensor(2.0))
    assert guard.check(2, stop=0).stop == 0
