"""What observes a model in evaluation mode leaves its mode, plan, and hooks as they were, also after an error."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.data.batch import Batch
from qsparse_moe.model.thresholds import calibrate
from qsparse_moe.model.unions import measured_unions
from tests.model.small_model import make, tokens


def calibrated(model, tokens_BS):
    positions = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    calibrate(model, [Batch(tokens_BS, tokens_BS, positions, None)])


def unions(model, tokens_BS):
    measured_unions(model, tokens_BS, [1, 2])


@pytest.mark.parametrize("observe", [calibrated, unions])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_mode_the_plan_and_the_hooks_are_those_from_before(observe, is_training, fails, monkeypatch):
    model = make(sparsity={"default": 0.5, "backend": "torch"}, moe={"backend": "loop", "capacity_factor": 0.5})
    model.train(is_training)
    plan, seen = model.sparsity_plan, []

    def watch(module, inputs):
        seen.append(module.training or torch.is_grad_enabled())
        if fails:
            raise RuntimeError("stopped")

    handle = model.layers[1].moe.router.register_forward_pre_hook(watch)
    if fails:
        with pytest.raises(RuntimeError, match="stopped"):
            observe(model, tokens())
    else:
        observe(model, tokens())
    handle.remove()
    assert seen and not any(seen), "a capacity, jitter, noise, and gradients belong to training"
    assert {module.training for module in model.modules()} == {is_training}
    assert model.sparsity_plan is plan
    sites = [site for block in model.blocks() for site in block.sites().values()]
    assert all(site.hook is None for site in sites) and all(router.hook is None for router in model.routers())
