"""Products under ``selection: shared`` have their true size in training: the operations that torch counts, by hand.

N rows, D width, F hidden width.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.experts import Experts
from qsparse_moe.moe.runtime import resolve_runtime
from qsparse_moe.nn.feed_forward import FeedForward

N, D, F = 20, 32, 64
SITES = {"both sites": (0.75, 0.75), "inputs": (0.75, 0.0), "hidden": (0.0, 0.75)}


def config(activation, gradient, sparsities):
    sites = zip(("expert_input", "expert_hidden", "shared_input", "shared_hidden"), sparsities * 2, strict=True)
    sparsity = {
        "default": 0.0,
        "overrides": [{"site": site, "sparsity": value} for site, value in sites],
        "selection": "shared",
        "gradient": gradient,
        "backend": "torch",
    }
    moe = {"num_experts": 3, "expert_hidden_size": F, "activation": activation, "backend": "loop"}
    return ModelConfig.model_validate(
        {"hidden_size": D, "num_heads": 2, "moe": moe | {"num_shared_experts": 1}, "sparsity": sparsity}
    )


def prepared(module, sites, sparsities):
    """The module in double precision, whose products torch counts, in a step with averages that measures nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    for site, sparsity in zip(sites, sparsities, strict=True):
        site.set_sparsity([sparsity] * site.shared.num_experts)
        site.shared.mean_energy_ED.uniform_(1, 2)
        site.shared.measures = False
    return module.train().double()


def routed_experts(settings, sparsities):
    runtime = resolve_runtime(settings, "cpu")
    experts = Experts(settings, runtime)
    input_site = runtime.sites.make_site("expert_input", D, settings.sparsity, num_experts=3)
    prepared(experts, (input_site, experts.hidden_site), sparsities)
    counts = torch.tensor([9, 0, N - 9])
    owners = torch.arange(3).repeat_interleave(counts)
    return lambda x_ND: experts(x_ND, counts, owners, with_stats=False, input_site=input_site.train())[0]


def shared_expert(settings, sparsities):
    layer = FeedForward(settings, "shared", F, resolve_runtime(settings, "cpu").sites)
    prepared(layer, (layer.input_site, layer.hidden_site), sparsities)
    return lambda x_ND: layer(x_ND[None], with_stats=False)[0][0]


def operations(module):
    """The operations of the products of a step: forward, and the gradients of the inputs and of the weights."""
    x_ND = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        y_ND = module(x_ND)
        (y_ND * torch.randn_like(y_ND)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("make", [routed_experts, shared_expert])
@pytest.mark.parametrize("activation", ["swiglu", "relu2glu", "relu2"])
@pytest.mark.parametrize("gradient", ["masked", "ste"])
@pytest.mark.parametrize("sites", SITES)
def test_a_step_multiplies_selected_features_only(make, activation, gradient, sites):
    inputs, hidden = (round((1 - sparsity) * size) for sparsity, size in zip(SITES[sites], (D, F), strict=True))
    inner = 1 if activation == "relu2" else 2
    dense = inner * D * F + F * D
    if gradient == "masked":
        # Gate and up compute the hidden features that down reads, and nothing else has a gradient.
        products = 3 * (inner * inputs * hidden + hidden * D)
    else:
        # The output and the gradient of the weights; the gradient of the inputs is that of every feature.
        products = 2 * (inner * inputs * F + hidden * D) + dense
    settings = config(activation, gradient, SITES[sites])
    found = operations(make(settings, SITES[sites]))
    assert found == 2 * N * products
    if sites == "both sites":
        masked = 5 / 32 if activation == "relu2" else 1 / 8
        assert found / operations(make(settings, (0.0, 0.0))) == (masked if gradient == "masked" else 1 / 2)
