"""Messages for values that are not finite, on one rank; two ranks are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard

ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def pass_through(guard, *, forward=(), backward=(), loss=1.0, bad=torch.nan):
    """Run three layers; the given ones have one bad value in their output, or in the gradient that enters them."""
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    outputs = []
    for layer in range(3):
        hidden = hidden * torch.tensor([1.0, bad if layer in forward else 1.0, 1.0, 1.0])
        guard.layer_hook(layer, hidden)
        outputs.append(hidden)
    guard.add_loss(torch.tensor(loss))
    spoiled = torch.ones(2, 3, 4)
    spoiled[1, 2, 3] = bad
    total = sum((out * (spoiled if layer in backward else torch.ones(()))).sum() for layer, out in enumerate(outputs))
    total.backward()


def test_finite_values_pass_and_the_request_to_stop_is_returned():
    guard = NonFiniteGuard(3, ALONE)
    pass_through(guard)
    assert guard.check(1, stop=0) == (0, False)
    pass_through(guard)
    assert guard.check(2, stop=15, save=True) == (15, True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_lowest_layer_with_a_bad_output_is_named(bad):
    guard = NonFiniteGuard(3, ALONE)
    pass_through(guard, forward=(1,), backward=(0,), loss=float("nan"), bad=bad)
    with pytest.raises(TrainingDiverged, match=r"^step 7: the output of layer 1 is not finite on rank 0\. Nothing of "):
        guard.check(7, stop=0)


def test_a_bad_value_is_remembered_over_micro_batches_and_forgotten_after_the_step():
    guard = NonFiniteGuard(3, ALONE)
    pass_through(guard, forward=(2,))
    pass_through(guard)
    with pytest.raises(TrainingDiverged, match="step 3: the output of layer 2"):
        guard.check(3, stop=0)
    pass_through(guard)
    assert guard.check(4, stop=0) == (0, False)


def test_a_bad_loss_alone_is_reported_as_the_loss():
    guard = NonFiniteGuard(3, ALONE)
    pass_through(guard, loss=float("inf"))
    with pytest.raises(TrainingDiverged, match="step 3: the loss is not finite on rank 0"):
        guard.check(3, stop=0)


def test_the_highest_layer_with_a_bad_gradient_is_named():
    guard = NonFiniteGuard(3, ALONE)
    pass_through(guard, backward=(1,))
    with pytest.raises(TrainingDiverged, match="step 3: the gradient that enters layer 1 from above is not finite"):
        guard.check(3, stop=0)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_bad_norm_is_reported_if_nothing_else_is_bad(norm):
    guard = NonFiniteGuard(3, ALONE)
    guard.check_norm(5, 1e30)
    with pytest.raises(TrainingDiverged, match=rf"step 5: the gradient norm is {norm}\. .*training\.learning_rate"):
        guard.check_norm(5, norm)


def test_finite_values_of_fp16_whose_sum_is_none_pass():
    guard = NonFiniteGuard(1, ALONE)
    hidden = torch.full((2, 8), 6e4, dtype=torch.float16, requires_grad=True)
    guard.layer_hook(0, hidden)
    hidden.backward(torch.full((2, 8), -6e4, dtype=torch.float16))
    guard.add_loss(torch.tensor(6e4, dtype=torch.float16))
    guard.add_loss(torch.tensor(6e4, dtype=torch.float16))
    assert guard.check(1, stop=0) == (0, False)


def test_an_output_outside_of_the_graph_has_no_gradient_to_check():
    guard = NonFiniteGuard(1, ALONE)
    guard.layer_hook(0, torch.ones(2))
    assert guard.check(1, stop=0) == (0, False)


class FirstToSee(Distributed):
    """The only rank that has seen a value: the maximum over the ranks is its own."""

    def all_reduce(self, tensor, *arguments, **settings):
        return tensor


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_rank_that_has_seen_the_value_is_named(rank):
    guard = NonFiniteGuard(2, FirstToSee(rank, 4, rank, torch.device("cpu")))
    guard.layer_hook(1, torch.tensor([torch.nan]))
    with pytest.raises(TrainingDiverged, match=f"the output of layer 1 is not finite on rank {rank}"):
        guard.check(5, stop=0)
