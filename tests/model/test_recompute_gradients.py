"""Recomputation of activations changes neither gradients nor statistics nor the noise of the router."""

from __future__ import annotations

import copy

import pytest
import torch

from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.moe.losses import StepLoad
from tests.model.small_model import RECOMPUTED, make, tokens

CASES = {
    "dropless": ({}, {}),
    "capacity": ({"capacity_factor": 0.5, "moe_layer_interval": 2}, {}),
    "fewer experts": ({}, {"routing_overrides": [{"layers": 0, "experts_per_token": 1}, {"layers": 1, "top_p": 0.6}]}),
}


@pytest.mark.parametrize(("moe", "sparsity"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("mode", RECOMPUTED)
def test_checkpointing_changes_neither_gradients_nor_sums(moe, sparsity, mode):
    plain = make(sparsity=SparsityConfig(default=0.5, **sparsity), moe=moe)
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing = mode
    outputs = [model(tokens(), tokens()) for model in (plain, recomputed)]
    for out in outputs:
        out.loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputed.get_parameter(name).grad), name
    for name, value in outputs[0].stats.items():
        assert torch.equal(value, outputs[1].stats[name]), name


NOISY = {"router_jitter": 0.3, "router_noise": 0.5, "router": "sigmoid_topk", "load_balance_scope": "global_batch"}


@pytest.mark.parametrize("mode", RECOMPUTED)
def test_noise_of_the_router_is_the_same_in_recomputation(mode):
    plain = make(moe=NOISY)
    with torch.no_grad():
        for block in plain.blocks():
            block.moe.router.weight.mul_(20)  # else the noise alone decides
    recomputed = copy.deepcopy(plain)
    recomputed.activation_checkpointing = mode
    outputs = []
    for model in (plain, recomputed):
        model.step_load = StepLoad(lambda rows: rows)
        torch.manual_seed(3)
        outputs.append(model(tokens(), tokens()))
        outputs[-1].loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputed.get_parameter(name).grad), name
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert not torch.equal(plain(tokens(), tokens()).loss, outputs[0].loss), "the next draws are others"
    calm = [plain.eval()(tokens()).logits_BSV for _ in range(2)]
    assert torch.equal(*calm)
