from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import TrainingConfig
from qsparse_moe.model.transformer import build_model
from qsparse_moe.training.engines.optimizer import build_adamw, get_step, set_step, start_state
from tests.support.runs import tiny_config

CONFIG = TrainingConfig(weight_decay=0.2, beta1=0.8, beta2=0.9, epsilon=1e-6)


def test_matrices_decay_and_norms_do_not(tmp_path):
    model = build_model(tiny_config(tmp_path, "run").model)
    groups = build_adamw(model.parameters(), CONFIG).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay.pop(id(parameter)) == (0.0 if "norm" in name else 0.2), name
    assert not decay
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in groups)
    assert [group["lr"] for group in groups] == [0.0, 0.0], "until a step sets one"


def test_parameters_of_one_kind_are_one_group():
    for shape, decay in (((3,), 0.0), ((3, 2), 0.2), ((2, 3, 2), 0.2)):
        (group,) = build_adamw([torch.nn.Parameter(torch.ones(shape))], CONFIG).param_groups
        assert group["weight_decay"] == decay


def test_an_initialised_state_gives_the_first_step_of_adamw():
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).clone()) for _ in range(2)]
    started, plain = (build_adamw([weight], CONFIG) for weight in weights)
    start_state(started, weights[0])
    assert get_step(started) == 0
    for optimizer, weight in zip((started, plain), weights, strict=True):
        optimizer.param_groups[0]["lr"] = 0.1
        weight.grad = torch.linspace(1, 2, 12).view(3, 4)
        optimizer.step()
    assert weights[0].equal(weights[1]) and get_step(started) == 1
    update = torch.linspace(-1, 1, 12).view(3, 4) * (1 - 0.1 * 0.2) - 0.1
    torch.testing.assert_close(weights[0].detach(), update, rtol=1e-5, atol=1e-6)


def test_the_step_counter_is_set_for_every_parameter_and_counts_on():
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = build_adamw(weights, CONFIG)
    for weight in weights:
        start_state(optimizer, weight)
        weight.grad = torch.ones_like(weight)
    set_step(optimizer, 41)
    optimizer.step()
    assert get_step(optimizer) == 42
    optimizer.state[weights[0]]["step"].fill_(7)
    with pytest.raises(AssertionError, match=r"different numbers of steps: \[7, 42\]"):
        get_step(optimizer)
