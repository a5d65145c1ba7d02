"""An estimate of sensitivities leaves the mode, gradients, estimators, hooks, and plan of the model as they were."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.data.batch import Batch
from tests.model.small_model import make, tokens


@pytest.mark.parametrize("is_training", [True, False])
def test_everything_that_the_estimate_changes_is_put_back(is_training):
    model = make(num_layers=2, sparsity={"default": 0.5, "backend": "torch"}, moe={"backend": "loop"})
    model.train(is_training)
    model.set_ste_share(0.25)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("w_up" in name)
    plan, seen = model.sparsity_plan, []
    watch = model.layers[1].moe.router.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    tokens_BS = tokens()
    batch = Batch(tokens_BS, tokens_BS, torch.arange(12).expand_as(tokens_BS), None)
    estimate(model, DocumentSequences((batch,), (torch.zeros_like(tokens_BS),), 1), [0.25, 0.75])
    watch.remove()
    assert seen and not any(seen)
    assert {module.training for module in model.modules()} == {is_training}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if "w_up" in name
    }
    assert all(parameter.grad is None for parameter in model.parameters())
    sites = [site for block in model.blocks() for site in block.sites().values()]
    assert {site.ste_share for site in sites} == {0.25}
    assert all(site.hook is None for site in sites) and all(router.hook is None for router in model.routers())
    assert model.sparsity_plan is plan
