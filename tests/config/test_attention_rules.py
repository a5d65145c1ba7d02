"""Rules of latent attention: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import cached_values, rotary_size, site_width, site_width_setting
from tests.config.settings_by_path import build, messages
from tests.support.messages import assert_one_message

PATH = "model.latent_attention"
LATENT = {
    f"{PATH}.key_value_rank": 12,
    f"{PATH}.nope_head_size": 6,
    f"{PATH}.rope_head_size": 4,
    f"{PATH}.value_head_size": 10,
}
CASES = {
    "a size without the rank": (
        {f"{PATH}.query_rank": 8},
        (f"{PATH}.query_rank (8)", f"{PATH}.key_value_rank is null", "ordinary attention", "remove it"),
        {f"{PATH}.query_rank": None},
    ),
    "a missing head size": (
        LATENT | {f"{PATH}.value_head_size": None},
        (f"{PATH}.value_head_size (null) must be set", f"{PATH}.key_value_rank (12)", "128"),
        {f"{PATH}.value_head_size": 10},
    ),
    "an odd rotation": (
        LATENT | {f"{PATH}.rope_head_size": 5},
        (f"{PATH}.rope_head_size (5) must be even", "6 is even"),
        {f"{PATH}.rope_head_size": 6},
    ),
    "key-value heads": (
        LATENT | {"model.num_kv_heads": 2},
        ("model.num_kv_heads (2)", f"{PATH}.key_value_rank is 12", "every head", "remove it", "null"),
        {"model.num_kv_heads": None},
    ),
    "a head size": (
        LATENT | {"model.head_size": 16},
        ("model.head_size (16)", f"{PATH}.key_value_rank is 12", "nope_head_size + rope_head_size", "remove it"),
        {"model.head_size": None},
    ),
    "norms of queries and keys": (
        LATENT | {"model.qk_norm": True},
        ('model.qk_norm ("per_head")', f"{PATH}.key_value_rank is 12", "norms of its own", "remove it"),
        {"model.qk_norm": False},
    ),
    "biases": (
        LATENT | {"model.attention_bias": "qkv"},
        ('model.attention_bias ("qkv")', f"{PATH}.key_value_rank is 12", "no biases", "remove it"),
        {"model.attention_bias": "none"},
    ),
    "groups that do not divide the values": (
        LATENT | {"model.sparsity.selection": "block", "model.sparsity.default": 0.5, "model.sparsity.group_size": 16},
        (
            "model.sparsity.group_size (16) must divide",
            f"model.num_heads * {PATH}.value_head_size (40)",
            "attention_output",
        ),
        {"model.sparsity.group_size": 8},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_setting_value_rule_and_way_out(case):
    settings, parts, _ = CASES[case]
    assert_one_message(messages(settings), parts)


@pytest.mark.parametrize("case", CASES)
def test_way_out_repairs_the_settings(case):
    settings, _, repair = CASES[case]
    assert messages(settings | repair) == []


def test_heads_need_not_divide_the_width():
    assert messages(LATENT | {"model.num_heads": 3, "model.hidden_size": 44}) == []


def test_derived_sizes_are_those_of_the_latent_vector():
    latent = build(LATENT).model
    assert (rotary_size(latent), cached_values(latent)) == (4, 16)
    assert (site_width(latent, "attention_output"), site_width(latent, "attention_input")) == (40, 128)
    assert site_width_setting(latent, "attention_output") == f"model.num_heads * {PATH}.value_head_size"
    ordinary = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=2)
    assert (rotary_size(ordinary), cached_values(ordinary)) == (16, 64)
