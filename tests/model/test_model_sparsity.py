"""Sparsity of the whole model: changed at run time, one K per site and expert, the blended gradient."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, SparsityConfig
from qsparse_moe.config.shapes import site_width
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.transformer import build_model
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.model.small_model import make, tokens


def test_a_router_of_sparse_tokens_refuses_a_plan_that_treats_experts_differently():
    model = make(moe={"router_input": "sparse"})
    plan = SparsityPlan.uniform(model.config, 0.5)
    model.set_sparsity(plan)
    apart = dict(plan.values) | {(1, "expert_input"): (0.5, 0.5, 0.25, 0.5)}
    with pytest.raises(ConfigError, match=r"layer 1, expert_input has S = \[0\.5, 0\.5, 0\.25, 0\.5\].*router_input"):
        model.set_sparsity(SparsityPlan(apart))
    hidden = dict(plan.values) | {(1, "expert_hidden"): (0.5, 0.5, 0.25, 0.5)}
    model.set_sparsity(SparsityPlan(hidden))
    assert model(tokens(), tokens()).loss.isfinite()


def test_sparsity_changes_at_run_time_and_back_without_a_trace():
    model, ids = make(), tokens()
    dense = model(ids).logits_BSV
    keys = list(model.state_dict())
    model.set_sparsity(SparsityPlan.uniform(model.config, 0.7))
    assert not torch.allclose(model(ids).logits_BSV, dense)
    model.set_sparsity(SparsityPlan.uniform(model.config, 0.0))
    assert torch.equal(model(ids).logits_BSV, dense)
    assert list(model.state_dict()) == keys
    before = model.sparsity_plan
    with pytest.raises(ConfigError, match="the model needs"):
        model.set_sparsity(SparsityPlan.uniform(make(num_layers=2).config, 0.5))
    assert model.sparsity_plan is before and torch.equal(model(ids).logits_BSV, dense)


def test_experts_that_differ_in_sparsity_are_counted_by_their_own_k():
    model = make(
        sparsity=SparsityConfig.model_validate(
            {"overrides": [{"site": "expert_hidden", "experts": 1, "sparsity": 0.75}]}
        )
    )
    stats = model(tokens()).stats
    rows_LE = stats["router/routed_LE"]
    want_L = 16 * rows_LE.sum(1) - 12 * rows_LE[:, 1]
    assert torch.equal(stats["sparsity/expert_hidden/selected_LE"].sum(-1), want_L)


def test_every_site_of_every_layer_blends_its_gradient():
    model = make(moe={"num_dense_layers": 1, "num_shared_experts": 1}, sparsity=SparsityConfig(default=0.5))
    model.set_ste_share(0.25)
    sites = {f"layers.{n}.{name}": site for n, b in enumerate(model.blocks()) for name, site in b.sites().items()}
    in_the_model = [module for module in model.modules() if isinstance(module, SparseSite)]
    assert {id(site) for site in in_the_model} == {id(site) for site in sites.values()} and len(sites) >= 12
    assert {name: site.ste_share for name, site in sites.items()} == dict.fromkeys(sites, 0.25)


def test_every_site_reports_its_own_sums():
    """Every site has another K, so that the sums of two sites that were swapped would differ."""
    kept = {
        "attention_input": 15, "attention_output": 14, "dense_input": 13, "dense_hidden": 12, "expert_input": 11,
        "expert_hidden": 10, "shared_input": 9, "shared_hidden": 8,
    }  # fmt: skip
    moe = {"num_experts": 4, "expert_hidden_size": 24, "num_dense_layers": 1, "num_shared_experts": 1}
    shape = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 32,
        "moe": moe | {"activation": "swiglu"},
    }
    config = ModelConfig.model_validate(shape)
    sites = {site: 1 - kept[site] / site_width(config, site) for site in kept}
    config = ModelConfig.model_validate(shape | {"sparsity": {"sites": sites}})
    output = build_model(config)(torch.randint(0, 32, (2, 6)))
    widths, found = {}, {}
    for site in kept:
        sums = {
            name: output.stats[f"sparsity/{site}/{name}_LE"].sum().item() for name in ("rows", "selected", "nonzero")
        }
        found[site] = sums["selected"] / sums["rows"]
        assert sums["nonzero"] == sums["selected"], "SwiGLU leaves no zeros"
        widths[site] = output.stats[f"sparsity/{site}/used_LED"].shape[-1]
    assert found == kept
    assert widths == dict.fromkeys(kept, 16) | {"dense_hidden": 48, "expert_hidden": 24, "shared_hidden": 24}
