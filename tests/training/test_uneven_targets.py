"""The loss of a step is the mean over its targets, however they are distributed over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.model.transformer import build_model
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.build import build_engine
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.step import train_step, weighted
from tests.support.runs import tiny_config

LENGTH = 24
# Without selection, so that rounding decides nothing.
DENSE = {"sparsity": {"default": 0.0, "backend": "torch"}}


def uneven_batch(num_sequences=8):
    """Return sequences whose numbers of targets are 1, 4, 7, ..., in one batch."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 257, (num_sequences, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for index in range(num_sequences):
        targets[index, 1 + 3 * index :] = IGNORED_LABEL
    return Batch(tokens[:, :-1], targets, torch.arange(LENGTH).expand(num_sequences, -1), None)


def parts_of(batch, size):
    return [Batch(*parts, None) for parts in zip(*(part.split(size) for part in batch[:3]), strict=True)]


def alone():
    return Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def step_of(folder, batches, **settings):
    """Return the result of one step of the torch engine and the weights after it."""
    size = len(batches[0].tokens_BS)
    config = tiny_config(folder, "run", model=DENSE, engine="torch", micro_batch_size=size, **settings)
    engine = build_engine(config, build_model(config.model, seed=3), alone())
    guard = NonFiniteGuard(2, alone())
    found = train_step(engine, batches, step=1, learning_rate=0.01, guard=guard, report=True, weighs_targets=True)
    return found, {name: p.detach() for name, p in engine.model.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_split_into_micro_batches_changes_nothing(tmp_path, precision):
    batch = uneven_batch()
    together, weights = step_of(tmp_path, [batch], precision=precision)
    split, others = step_of(tmp_path, parts_of(batch, 2), precision=precision)
    tolerance = {"fp32": 2e-6, "bf16": 1e-2}[precision]
    assert split.losses == pytest.approx(together.losses, rel=tolerance)
    assert split.grad_norm == pytest.approx(together.grad_norm, rel=5 * tolerance)
    for name in weights if precision == "fp32" else ():
        torch.testing.assert_close(others[name], weights[name], rtol=0, atol=2e-5)


def test_the_loss_is_the_mean_over_all_targets_and_the_routers_losses_over_micro_batches(tmp_path):
    batches = parts_of(uneven_batch(), 2)
    found, _ = step_of(tmp_path, batches)
    model = build_model(tiny_config(tmp_path, "run", model=DENSE).model, seed=3)
    outputs = [model(b.tokens_BS, targets_BS=b.targets_BS, positions_BS=b.positions_BS) for b in batches]
    sums = [
        F.cross_entropy(output.logits_BSV.flatten(0, 1), b.targets_BS.flatten(), reduction="sum")
        for output, b in zip(outputs, batches, strict=True)
    ]
    # 1 + 4 + ... + 22 targets.
    want = sum(sums).item() / 92
    plain = sum(output.losses["lm_loss"].item() for output in outputs) / 4
    assert abs(want - plain) > 1e-3, "equal weights would give this loss, too"
    assert found.losses["lm_loss"] == pytest.approx(want, rel=1e-6)
    for name in ("load_balance_loss", "router_z_loss"):
        assert found.losses[name] == pytest.approx(sum(o.losses[name].item() for o in outputs) / 4, rel=1e-6)


@dataclass(frozen=True)
class Pair(Distributed):
    """One of two ranks, the other of which has 60 targets."""

    calls: list[int] = field(default_factory=list)

    def all_reduce(self, tensor, *_, **__):
        self.calls.append(int(tensor))
        return tensor + 60


def test_the_targets_of_other_ranks_count():
    pair = Pair(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))
    batches = weighted(parts_of(uneven_batch(4), 2), pair)
    # 1 + 4 and 7 + 10 targets here, 82 on both ranks, in four micro-batches.
    assert pair.calls == [22]
    assert [batch.loss_weight.item() for batch in batches] == pytest.approx([5 * 4 / 82, 17 * 4 / 82])


def test_equal_numbers_of_targets_have_weights_of_exactly_one_and_none_at_all_no_nan():
    full = [batch._replace(targets_BS=batch.tokens_BS) for batch in parts_of(uneven_batch(6), 2)]
    assert [batch.loss_weight.item() for batch in weighted(full, alone())] == [1.0, 1.0, 1.0]
    none = [batch._replace(targets_BS=torch.full_like(batch.targets_BS, IGNORED_LABEL)) for batch in full]
    assert [batch.loss_weight.item() for batch in weighted(none, alone())] == [0.0, 0.0, 0.0]
