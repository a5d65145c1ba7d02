"""Sizes that follow from other settings, written out by hand with factors above 1 that all differ."""

from __future__ import annotations

import pytest

from qsparse_moe.config.schema import LatentAttentionConfig, ModelConfig, MoEConfig
from qsparse_moe.config.shapes import (
    LatentSizes,
    cached_values,
    dense_hidden_size,
    has_gate,
    head_size,
    latent_sizes,
    layer_sites,
    layers_with_site,
    mixed_size,
    model_sites,
    num_kv_heads,
    rotary_size,
    shared_hidden_size,
    site_width,
    site_width_setting,
    vocab_size,
)

ATTENTION = ("attention_input", "attention_output")
LATENT = LatentAttentionConfig(key_value_rank=13, query_rank=9, nope_head_size=6, rope_head_size=4, value_head_size=11)
# Experts in layers 2 and 5; the others are dense.
MIXED = ModelConfig(
    hidden_size=48,
    num_heads=3,
    num_layers=7,
    moe=MoEConfig(
        num_experts=8,
        experts_per_token=5,
        expert_hidden_size=20,
        num_shared_experts=2,
        num_dense_layers=2,
        moe_layer_interval=3,
    ),
)


def test_a_dense_layer_is_as_wide_as_all_experts_of_a_token():
    moe = MoEConfig(num_experts=8, experts_per_token=3, expert_hidden_size=48)
    assert dense_hidden_size(ModelConfig(moe=moe)) == 144
    assert dense_hidden_size(ModelConfig(moe=moe.model_copy(update={"dense_hidden_size": 100}))) == 100


def test_shared_experts_are_as_wide_as_their_number_of_experts():
    moe = MoEConfig(num_experts=8, experts_per_token=2, expert_hidden_size=48, num_shared_experts=3)
    assert shared_hidden_size(ModelConfig(moe=moe)) == 144
    # A width of their own is that of all of them together.
    assert shared_hidden_size(ModelConfig(moe=moe.model_copy(update={"shared_expert_hidden_size": 100}))) == 100
    assert shared_hidden_size(ModelConfig(moe=MoEConfig(shared_expert_hidden_size=100))) == 0


def test_a_vocabulary_that_is_not_set_is_that_of_bytes():
    assert (vocab_size(ModelConfig()), vocab_size(ModelConfig(vocab_size=300))) == (264, 300)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        # Size of a head, key and value heads, rotated channels, width of the result, values per token in the cache.
        ({}, (20, 6, 20, 120, 240)),
        ({"num_kv_heads": 2}, (20, 2, 20, 120, 80)),
        ({"head_size": 14}, (14, 6, 14, 84, 168)),
        ({"head_size": 14, "num_kv_heads": 3}, (14, 3, 14, 84, 84)),
    ],
)
def test_sizes_of_attention(settings, sizes):
    config = ModelConfig(hidden_size=120, num_heads=6, **settings)
    found = (head_size(config), num_kv_heads(config), rotary_size(config), mixed_size(config), cached_values(config))
    assert found == sizes


def test_sizes_of_latent_attention():
    config = ModelConfig(hidden_size=120, num_heads=6, latent_attention=LATENT)
    sizes = latent_sizes(config)
    assert sizes == LatentSizes(key_value_rank=13, query_rank=9, nope_head_size=6, rope_head_size=4, value_head_size=11)
    assert (sizes.query_head_size, sizes.cached_size) == (10, 17)
    assert (rotary_size(config), mixed_size(config), cached_values(config)) == (4, 66, 17)
    assert latent_sizes(ModelConfig()) is None


@pytest.mark.parametrize(
    ("activation", "gate"), [("swiglu", True), ("relu2glu", True), ("reglu", True), ("drelu", True), ("relu2", False)]
)
def test_only_relu2_has_no_gate_matrix(activation, gate):
    assert has_gate(ModelConfig(moe=MoEConfig(activation=activation))) is gate


def test_sites_of_dense_layers_and_of_layers_with_experts_and_shared_experts():
    dense = (*ATTENTION, "dense_input", "dense_hidden")
    experts = (*ATTENTION, "expert_input", "expert_hidden", "shared_input", "shared_hidden")
    assert [layer_sites(MIXED, layer) for layer in range(7)] == [dense, dense, experts, dense, dense, experts, dense]
    assert layers_with_site(MIXED, "shared_hidden") == (2, 5)
    assert layers_with_site(MIXED, "dense_input") == (0, 1, 3, 4, 6)
    assert layers_with_site(MIXED, "attention_output") == (0, 1, 2, 3, 4, 5, 6)
    assert model_sites(MIXED) == (
        *ATTENTION, "expert_input", "expert_hidden", "shared_input", "shared_hidden", "dense_input", "dense_hidden",
    )  # fmt: skip
    assert model_sites(ModelConfig()) == (*ATTENTION, "expert_input", "expert_hidden")


OWN_WIDTHS = MIXED.model_copy(
    update={
        "head_size": 14,
        "moe": MIXED.moe.model_copy(update={"shared_expert_hidden_size": 72, "dense_hidden_size": 90}),
    }
)
EXPERT = "model.moe.expert_hidden_size"
WIDTHS = {
    "attention_input": (48, "model.hidden_size", 48, "model.hidden_size"),
    "attention_output": (48, "model.hidden_size", 42, "model.num_heads * model.head_size"),
    "expert_input": (48, "model.hidden_size", 48, "model.hidden_size"),
    "expert_hidden": (20, EXPERT, 20, EXPERT),
    "shared_input": (48, "model.hidden_size", 48, "model.hidden_size"),
    "shared_hidden": (40, f"model.moe.num_shared_experts * {EXPERT}", 72, "model.moe.shared_expert_hidden_size"),
    "dense_input": (48, "model.hidden_size", 48, "model.hidden_size"),
    "dense_hidden": (100, f"model.moe.experts_per_token * {EXPERT}", 90, "model.moe.dense_hidden_size"),
}


@pytest.mark.parametrize("site", WIDTHS)
def test_the_width_of_a_site_and_the_settings_that_give_it(site):
    found = [(site_width(config, site), site_width_setting(config, site)) for config in (MIXED, OWN_WIDTHS)]
    assert (*found[0], *found[1]) == WIDTHS[site]
