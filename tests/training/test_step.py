"""The parts of a training step that need no model: totals over micro-batches, and their reduction over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

from qsparse_moe.model.output import ModelOutput
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.step import StepTotals, _layer_norms, _routed_since_report, reduce_tensors


@dataclass(frozen=True)
class Two(Distributed):
    """One of two ranks, the other of which has 10 more of every number and every flag set."""

    calls: list[tuple[object, torch.dtype, int]] = field(default_factory=list)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, *, group=None):
        self.calls.append((op, tensor.dtype, len(tensor)))
        other = tensor + 10 if op == dist.ReduceOp.SUM else torch.ones_like(tensor)
        return tensor + other if op == dist.ReduceOp.SUM else torch.maximum(tensor, other)


def two():
    return Two(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))


def test_numbers_are_added_in_one_collective_and_flags_combined_in_another():
    ranks = two()
    tensors = [torch.tensor([[True, False]]), torch.tensor([[1.5], [2.5]]), torch.tensor(False), torch.tensor(7)]
    found = reduce_tensors(tensors, ranks)
    assert [value.tolist() for value in found] == [[[True, True]], [[13.0], [15.0]], True, 24.0]
    assert [value.dtype for value in found] == [torch.bool, torch.float64, torch.bool, torch.float64]
    assert ranks.calls == [(dist.ReduceOp.SUM, torch.float64, 3), (dist.ReduceOp.MAX, torch.uint8, 3)]
    only_flags = two()
    reduce_tensors([torch.tensor(True)], only_flags)
    assert only_flags.calls == [(dist.ReduceOp.MAX, torch.uint8, 1)]


def test_sums_beyond_the_whole_numbers_of_fp32_stay_exact():
    (found,) = reduce_tensors([torch.tensor([2**24], dtype=torch.int64) + 1], two())
    assert found.tolist() == [2 * (2**24 + 1) + 10]


def output(loss, lm_loss, routed):
    stats = {"router/routed_LE": torch.tensor([routed]), "site/used_LED": torch.tensor([[[routed[0] > 1.0]]])}
    return ModelOutput(
        torch.empty(0), torch.tensor(loss, requires_grad=True), {"lm_loss": torch.tensor(lm_loss)}, stats
    )


def totals(*, report=True):
    made = StepTotals()
    for one in (output(3.0, 2.0, [1.0, 4.0]), output(5.0, 3.0, [2.0, 0.0]), output(1.0, 1.5, [0.0, 1.0])):
        made.add(one, num_micro_batches=4, report=report)
    return made


def test_losses_are_means_over_the_micro_batches_and_statistics_sums():
    made = totals()
    assert {name: value.item() for name, value in made.losses.items()} == {"loss": 9 / 4, "lm_loss": 6.5 / 4}
    assert not any(value.requires_grad for value in made.losses.values())
    assert {value.dtype for value in made.losses.values()} == {torch.float64}
    assert made.stats["router/routed_LE"].tolist() == [[3.0, 5.0]]
    assert made.stats["site/used_LED"].tolist() == [[[True]]]
    without = totals(report=False)
    assert without.losses == {} and without.stats["router/routed_LE"].tolist() == [[3.0, 5.0]]


def test_every_total_is_that_of_all_ranks_under_its_own_name():
    made = totals()
    made.layer_squares_L = torch.tensor([4.0, 9.0], dtype=torch.float64)
    made.earlier_routed_LE = torch.tensor([[20.0, 30.0]])
    found = made.reduced(two())
    assert {name: value.item() for name, value in found.losses.items()} == {"loss": 14.5, "lm_loss": 13.25}
    assert found.stats["router/routed_LE"].tolist() == [[16.0, 20.0]]
    assert found.stats["site/used_LED"].tolist() == [[[True]]]
    assert found.layer_squares_L.tolist() == [18.0, 28.0] and found.earlier_routed_LE.tolist() == [[50.0, 70.0]]
    assert _routed_since_report(found).tolist() == [[66.0, 90.0]]
    plain = totals().reduced(two())
    assert plain.layer_squares_L is None and plain.earlier_routed_LE is None
    assert _routed_since_report(plain).tolist() == [[16.0, 20.0]]
    assert _routed_since_report(StepTotals()) is None


def test_ranks_that_met_the_names_in_another_order_reduce_the_same_numbers_together(monkeypatch):
    sent = []
    monkeypatch.setattr(
        Two, "all_reduce", lambda self, tensor, op=None, *, group=None: sent.append(tensor.tolist()) or tensor
    )
    losses = {"loss": torch.tensor(1.0), "a_loss": torch.tensor(2.0)}
    stats = {"rows": torch.tensor([3.0]), "nonzero": torch.tensor([4.0])}
    for turn in (1, -1):
        made = StepTotals(dict(list(losses.items())[::turn]), dict(list(stats.items())[::turn])).reduced(two())
        assert (made.losses["loss"], made.losses["a_loss"]) == (1.0, 2.0)
        assert (made.stats["rows"], made.stats["nonzero"]) == (3.0, 4.0)
    assert sent == [[2.0, 1.0, 4.0, 3.0]] * 2


@pytest.mark.parametrize(("grad_norm", "norms"), [(3.0, (2.0, 3.0)), (float("inf"), None), (float("nan"), None)])
def test_layers_have_norms_unless_the_step_overflowed(grad_norm, norms):
    squares = torch.tensor([4.0, 9.0], dtype=torch.float64)
    assert _layer_norms(StepTotals(layer_squares_L=squares), grad_norm) == norms
    assert _layer_norms(StepTotals(), 1.0) is None
