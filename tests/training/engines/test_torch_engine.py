"""The plain engine against PyTorch code written out by hand, and the effect of recomputation on gradients."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.data.batch import Batch
from qsparse_moe.model.transformer import build_model
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.build import build_engine
from qsparse_moe.training.engines.torch_engine import TorchEngine
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.step import reduce_tensors, train_step
from tests.support.runs import tiny_config

ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def random_batches(count=4, rows=2, length=24):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 257, (count, rows, length + 1), generator=generator)
    positions = torch.arange(length).expand(rows, length)
    return [Batch(part[:, :-1], part[:, 1:], positions, None) for part in tokens]


def make_engine(tmp_path, **training):
    config = tiny_config(tmp_path, "run", **({"engine": "torch"} | training))
    model = build_model(config.model, seed=3)
    model.activation_checkpointing = config.training.activation_checkpointing
    return config, build_engine(config, model, ALONE)


def send_through(engine, batches):
    for index, batch in enumerate(batches):
        output = engine.forward(batch, with_stats=True)
        engine.backward(output.loss, is_last=index == len(batches) - 1)


@pytest.mark.parametrize("max_norm", [0.0, 0.05, 1e6])
def test_three_steps_are_those_of_clipped_adamw_by_hand(tmp_path, max_norm):
    config, engine = make_engine(tmp_path, gradient_clipping=max_norm)
    batches, rate = random_batches(), 0.01
    training = config.training
    model = build_model(config.model, seed=3)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    guard = NonFiniteGuard(2, ALONE)
    for step in (1, 2, 3):
        outcome = train_step(engine, batches, step=step, learning_rate=rate, guard=guard, report=True)
        loss = torch.stack(
            [model(b.tokens_BS, targets_BS=b.targets_BS, positions_BS=b.positions_BS).loss for b in batches]
        ).mean()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        assert outcome.losses["loss"] == pytest.approx(loss.item(), abs=2e-6)
        assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        factor = min(1.0, max_norm / norm.item()) if max_norm else 1.0
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = moments[name]
                first.lerp_(p.grad * factor, 1 - training.beta1)
                second.lerp_((p.grad * factor) ** 2, 1 - training.beta2)
                unbiased = first / (1 - training.beta1**step)
                scale = (second / (1 - training.beta2**step)).sqrt() + training.epsilon
                p.mul_(1 - rate * (0.0 if "norm" in name else training.weight_decay)).sub_(rate * unbiased / scale)
                p.grad = None
    assert engine.adam_step == 3
    for name, p in model.named_parameters():
        # A gradient near epsilon leaves the size of its step to rounding; the rate limits it.
        error = (engine.held(name, "weight").view_as(p) - p).abs()
        assert error.mean() < 1e-3 * rate and error.max() < rate, name


def test_bf16_computes_in_bf16_and_stores_everything_else_in_fp32(tmp_path):
    _, engine = make_engine(tmp_path, precision="bf16")
    send_through(engine, random_batches())
    parameters = dict(engine.model.named_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert {p.grad.dtype for p in parameters.values()} == {torch.float32}
    before = {name: engine.held(name, "weight").clone() for name in parameters}
    # A step of 1e-6 is far below what a bf16 weight of 0.02 can show.
    engine.update(1e-6)
    for name, p in parameters.items():
        master = engine.held(name, "weight")
        assert master.dtype == torch.float32 and p.flatten().equal(master.to(torch.bfloat16))
        assert not master.equal(before[name]), name
        assert {engine.held(name, moment).dtype for moment in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_gradients_of_micro_batches_are_added_in_fp32_in_bf16(tmp_path):
    """Sixteen equal micro-batches must give exactly the gradient of one; sums in bf16 would lose bits."""
    _, many = make_engine(tmp_path, precision="bf16", micro_batch_size=1, global_batch_size=16)
    _, one = make_engine(tmp_path, precision="bf16", micro_batch_size=1, global_batch_size=1)
    batch = random_batches(count=1, rows=1)
    send_through(many, batch * 16)
    send_through(one, batch)
    for (name, p), q in zip(many.model.named_parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_leaves_every_gradient_and_the_sums_as_they_are(tmp_path, precision):
    _, plain = make_engine(tmp_path, precision=precision)
    _, recomputed = make_engine(tmp_path, precision=precision, activation_checkpointing="full")
    batch = random_batches(count=1)[0]
    outputs = []
    for engine in (plain, recomputed):
        output = engine.forward(batch, with_stats=True)
        engine.backward(output.loss, is_last=True)
        outputs.append(output)
    for name, value in outputs[0].stats.items():
        assert outputs[1].stats[name].equal(value), name
    grads = [{name: p.grad for name, p in engine.model.named_parameters()} for engine in (plain, recomputed)]
    assert all(grads[0][f"layers.{layer}.moe.router.weight"].abs().sum() > 0 for layer in (0, 1))
    assert [name for name in grads[0] if not grads[0][name].equal(grads[1][name])] == []


def test_a_tied_head_is_one_parameter(tmp_path):
    config = tiny_config(tmp_path, "run", engine="torch")
    model = config.model.model_copy(update={"tie_embeddings": True})
    engine = TorchEngine(config, build_model(model), ALONE)
    assert "embedding.weight" in engine.shapes() and "head.weight" not in engine.shapes()
    send_through(engine, random_batches())
    assert engine.update(0.1) > 0
    assert engine.model.head.weight is engine.model.embedding.weight


def test_reduced_tensors_keep_their_order_and_shapes_in_float64():
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5), torch.tensor([1e-17 + 1.0, 1e17])]
    reduced = reduce_tensors(tensors, ALONE)
    assert [x.tolist() for x in reduced] == [[[1.0, 2.0], [3.0, 4.0]], 5.0, tensors[2].double().tolist()]
    assert {x.dtype for x in reduced} == {torch.float64}
    assert reduce_tensors([], ALONE) == []


def test_flags_stay_boolean_between_numbers():
    flags = torch.tensor([[True, False], [False, False]])
    before, used, after = reduce_tensors([torch.tensor(2), flags, torch.tensor([3])], ALONE)
    assert used.equal(flags)
    assert (before.tolist(), after.tolist()) == (2.0, [3.0])
