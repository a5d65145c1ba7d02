"""The gradient norm of each layer's matrices against autograd; layouts are tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.model.transformer import build_model
from qsparse_moe.moe.expert_group import ExpertGroup
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.build import build_engine
from qsparse_moe.training.engines.protocol import equal_shard
from qsparse_moe.training.monitor.layer_gradients import layer_matrices
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.step import train_step
from tests.support.runs import LATENT_MODEL, MIXED_MODEL, tiny_config
from tests.training.engines.test_torch_engine import ALONE, random_batches

ROUTERS = (".router.weight", ".token_gate")
"""They read the dense token."""
RANKED = LATENT_MODEL | {"latent_attention": LATENT_MODEL["latent_attention"] | {"query_rank": 10}}
MODELS = pytest.mark.parametrize("model", [None, MIXED_MODEL, RANKED], ids=["experts", "mixed", "latent"])


@MODELS
def test_every_matrix_of_a_layer_but_the_routers_is_counted_once(tmp_path, model):
    config = tiny_config(tmp_path, "run", model=model)
    shapes = {name: p.shape for name, p in build_model(config.model).named_parameters()}
    for layer, names in enumerate(layer_matrices(shapes)):
        inside = {name for name in shapes if name.startswith(f"layers.{layer}.") and len(shapes[name]) > 1}
        assert len(names) == len(set(names))
        assert set(names) == {name for name in inside if not name.endswith(ROUTERS)}
    assert layer == config.model.num_layers - 1


def test_layers_of_more_than_one_digit_keep_their_order():
    names = [f"layers.{layer}.dense.w_up" for layer in range(12)]
    assert layer_matrices(reversed(names)) == [[name] for name in names]


@MODELS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_norms_are_those_of_the_mean_gradient_before_clipping(tmp_path, model, precision):
    config = tiny_config(tmp_path, "run", model=model, engine="torch", precision=precision, gradient_clipping=0.01)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    engine = build_engine(config, build_model(config.model, seed=3), ALONE)
    by_hand = build_model(config.model, seed=3).to(dtype)
    batches = random_batches()
    squares = torch.zeros(config.model.num_layers, dtype=torch.float64)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in by_hand.named_parameters()}
    for batch in batches:
        loss = by_hand(batch.tokens_BS, targets_BS=batch.targets_BS, positions_BS=batch.positions_BS).loss
        grads = torch.autograd.grad(loss / len(batches), list(by_hand.parameters()))
        for total, grad in zip(sums.values(), grads, strict=True):
            total += grad
    for name, total in sums.items():
        if name.startswith("layers.") and not name.endswith(("norm.weight", ".bias", *ROUTERS)):
            squares[int(name.split(".")[1])] += total.square().sum()
    guard = NonFiniteGuard(config.model.num_layers, ALONE)
    outcome = train_step(engine, batches, step=1, learning_rate=0.01, guard=guard, report=True, layer_gradients=True)
    assert outcome.layer_grad_norms == pytest.approx(squares.sqrt().tolist(), rel=1e-5)
    assert min(outcome.layer_grad_norms) > 0.01, "clipping must bite, or its place is not tested"
    assert sum(norm**2 for norm in outcome.layer_grad_norms) < outcome.grad_norm**2


@pytest.mark.parametrize(("report", "layer_gradients"), [(True, False), (False, True)])
def test_a_step_without_a_report_reads_no_gradient(tmp_path, monkeypatch, report, layer_gradients):
    config = tiny_config(tmp_path, "run", engine="torch")
    engine = build_engine(config, build_model(config.model), ALONE)
    monkeypatch.setattr(engine, "gradient_shard", None)
    outcome = train_step(
        engine,
        random_batches(),
        step=1,
        learning_rate=0.01,
        guard=NonFiniteGuard(2, ALONE),
        report=report,
        layer_gradients=layer_gradients,
    )
    assert outcome.layer_grad_norms is None


def test_a_gradient_read_before_the_backward_is_an_internal_error(tmp_path):
    config = tiny_config(tmp_path, "run", engine="torch")
    engine = build_engine(config, build_model(config.model), ALONE)
    with pytest.raises(AssertionError, match="head.weight has no gradient"):
        engine.gradient_shard("head.weight")


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_the_shards_of_a_replicated_tensor_make_it_up(world_size):
    value = torch.arange(14.0).view(7, 2)
    ranks = [Distributed(rank, world_size, rank, torch.device("cpu")) for rank in range(world_size)]
    parts = [equal_shard(value, rank) for rank in ranks]
    assert torch.cat(parts).equal(value.flatten())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_shards_of_expert_parallel_weights_make_up_the_experts_of_each_rank():
    shares = [torch.arange(14.0).view(7, 2) + 100 * place for place in range(2)]
    parts = []
    for rank in range(6):
        group = ExpertGroup(rank % 2, 2)
        distributed = Distributed(rank, 6, rank, torch.device("cpu"))
        parts.append(equal_shard(shares[group.rank], distributed, group))
    for place, share in enumerate(shares):
        assert torch.cat(parts[place::2]).equal(share.flatten())
