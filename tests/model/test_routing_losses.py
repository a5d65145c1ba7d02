"""Routers inside the model: balance and z losses over layers and micro-batches, and balancing biases."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.moe.losses import StepLoad
from tests.model.small_model import RECOMPUTED, make, tokens


@pytest.mark.parametrize("mode", ["none", *RECOMPUTED])
def test_a_global_balance_loss_combines_the_load_of_the_step_with_the_probabilities_of_the_micro_batch(mode):
    model = make(moe={"load_balance_scope": "global_batch", "load_balance_coefficient": 1.0, "num_dense_layers": 1})
    model.activation_checkpointing = mode
    with torch.no_grad():
        for block in list(model.blocks())[1:]:
            block.moe.router.weight.mul_(50)  # with probabilities that are all alike every load has the same loss
    others = torch.rand(2, 1, 4, dtype=torch.float64) * 50  # rows of other ranks
    model.step_load = StepLoad(lambda rows: rows.add_(others))
    parts = [tokens(2)[:1], tokens(3)[2:], tokens(4)[3:]]
    seen = torch.zeros(2, 4, dtype=torch.float64)
    for part in parts:
        with torch.no_grad():
            model(tokens(5)[4:], tokens(5)[4:])  # no part of the step, as the next one is not
        model.eval()(tokens(5)[4:], tokens(5)[4:])
        model.train()
        want, rows = written_out_global_balance(model, part, seen, others[:, 0])
        out = model(part, part)
        torch.testing.assert_close(out.losses["load_balance_loss"], want.detach())
        router = model.layers[1].moe.router.weight
        rest = out.losses["lm_loss"] + model.config.moe.router_z_coefficient * out.losses["router_z_loss"]
        torch.testing.assert_close(out.loss.detach(), rest + want.detach())
        model.zero_grad()
        out.loss.backward()
        with_balance = router.grad.clone()
        model.zero_grad()
        alone = model.config.moe.model_copy(update={"load_balance_coefficient": 0.0})
        before, model.config = model.config, model.config.model_copy(update={"moe": alone})
        model.step_load, load = None, model.step_load
        model(part, part).loss.backward()
        model.config, model.step_load = before, load
        torch.testing.assert_close(
            with_balance - router.grad, torch.autograd.grad(want, router)[0], atol=1e-6, rtol=1e-4
        )
        seen = seen + rows + others[:, 0]
    model.step_load.reset()
    want, _ = written_out_global_balance(model, parts[0], torch.zeros(2, 4).double(), others[:, 0])
    torch.testing.assert_close(model(parts[0], parts[0]).losses["load_balance_loss"], want.detach())


def written_out_global_balance(model, part, seen, others):
    """E sum f P of the MoE layers, f from all rows of the step; and this micro-batch's own rows."""
    routings = []
    hooks = [
        block.moe.router.register_forward_hook(lambda module, inputs, output: routings.append(output))
        for block in model.blocks()
        if block.moe is not None
    ]
    load, model.step_load = model.step_load, None
    checkpointing, model.activation_checkpointing = model.activation_checkpointing, "none"
    model(part)
    model.step_load, model.activation_checkpointing = load, checkpointing
    for hook in hooks:
        hook.remove()
    losses, counted = [], []
    for layer, routing in enumerate(routings):
        rows = torch.bincount(routing.expert_ids_TA.flatten(), minlength=4).double()
        counted.append(rows)
        in_step = seen[layer] + others[layer] + rows
        share = in_step / in_step.sum()
        losses.append(4 * sum(share[e].float() * routing.probs_TE[:, e].mean() for e in range(4)))
    return sum(losses) / len(losses), torch.stack(counted)


def test_without_an_engine_a_global_batch_is_the_batch():
    one, other = make(moe={"load_balance_scope": "global_batch"}), make(moe={"load_balance_scope": "micro_batch"})
    for _ in range(2):
        assert torch.equal(one(tokens(), tokens()).loss, other(tokens(), tokens()).loss)


def test_biases_are_read_and_moved_layer_by_layer():
    assert make().router_bias_LE is None
    model = make(moe={"bias_update_rate": 0.5, "num_dense_layers": 1})
    assert model.router_bias_LE.tolist() == [[0.0] * 4] * 2
    model.update_router_bias(torch.tensor([[4.0, 0, 2, 2], [0, 0, 0, 8]]), 0.5)
    assert model.router_bias_LE.tolist() == [[-0.5, 0.5, 0, 0], [0.5, 0.5, 0.5, -0.5]]
    with pytest.raises(ValueError, match="shorter"):
        model.update_router_bias(torch.ones(1, 4), 0.5)
    assert "layers.1.moe.router.expert_bias" in model.state_dict()
    assert model.to(torch.bfloat16).router_bias_LE.dtype == torch.float32


def test_the_routers_losses_are_the_means_over_the_layers():
    model = make(num_layers=2, moe={"router_z_coefficient": 0.5, "load_balance_coefficient": 0.25})
    with torch.no_grad():
        for factor, block in zip((20.0, 60.0), model.blocks(), strict=True):
            block.moe.router.weight.mul_(factor)
    routings, hooks = [], []
    for router in model.routers():
        hooks.append(router.register_forward_hook(lambda module, inputs, output: routings.append(output)))
    out = model(tokens(), tokens())
    z_by_layer = [routing.logits_TE.logsumexp(-1).square().mean() for routing in routings]
    assert len(z_by_layer) == 2 and abs(z_by_layer[1] - z_by_layer[0]) > 0.1 * z_by_layer[0]
    torch.testing.assert_close(out.losses["router_z_loss"], sum(z_by_layer).detach() / 2)
    rest = out.losses["lm_loss"] + 0.25 * out.losses["load_balance_loss"]
    torch.testing.assert_close(out.loss.detach(), rest + 0.5 * sum(z_by_layer).detach() / 2)


def test_reported_terms_and_statistics_are_no_part_of_the_graph():
    out = make()(tokens(), tokens())
    assert out.loss.requires_grad and out.losses.keys() == {"lm_loss", "load_balance_loss", "router_z_loss"}
    assert not any(value.requires_grad for value in (*out.losses.values(), *out.stats.values()))


def test_a_pass_without_gradients_or_in_evaluation_does_not_count_towards_the_step():
    model = make(moe={"load_balance_scope": "global_batch"})
    first, second = tokens(), tokens().flip(0, 1)
    alone = model(second, second).losses["load_balance_loss"]
    calls = []
    model.step_load = StepLoad(lambda rows: calls.append(1) or rows)
    model(first, first)
    assert len(calls) == 1
    with torch.no_grad():
        assert torch.equal(model(second, second).losses["load_balance_loss"], alone)
    assert torch.equal(model.eval()(second, second).losses["load_balance_loss"], alone)
    assert len(calls) == 1, "neither pass is part of the step"
    assert not torch.equal(model.train()(second, second).losses["load_balance_loss"], alone) and len(calls) == 2
