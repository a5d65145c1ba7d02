"""Rules about the shape of the model: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.config.model_rules import divisors
from qsparse_moe.config.rules import broken_rules, check_model
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import has_experts, layer_sites, moe_layers, padded_vocabulary
from qsparse_moe.errors import ConfigError
from tests.config.settings_by_path import build, messages
from tests.support.messages import assert_one_message

# Broken settings; the parts of the message in order (settings with values, the numbers of the rule, the way out); and a
# change that repairs them.
CASES = {
    "heads that do not divide": (
        {"model.num_heads": 3},
        (
            "model.num_heads (3)",
            "model.hidden_size (128)",
            "model.head_size",
            "null",
            "2",
            "4",
            "model.head_size",
        ),
        {"model.num_heads": 4},
    ),
    "heads of an odd size": (
        {"model.hidden_size": 12, "model.num_heads": 4},
        (
            "model.num_heads (4)",
            "model.hidden_size (12)",
            "model.head_size",
            "null",
            "2",
            "3",
            "model.head_size",
        ),
        {"model.num_heads": 6},
    ),
    "a width without even heads": (
        {"model.hidden_size": 15, "model.num_heads": 3},
        (
            "model.num_heads (3)",
            "model.hidden_size (15)",
            "model.head_size",
            "null",
            "model.head_size",
        ),
        {"model.head_size": 4},
    ),
    "odd head size": (
        {"model.head_size": 31},
        (
            "model.head_size (31)",
            "32",
        ),
        {"model.head_size": 32},
    ),
    "key-value heads": (
        {"model.num_kv_heads": 3},
        (
            "model.num_kv_heads (3)",
            "model.num_heads (4)",
            "2",
            "4",
        ),
        {"model.num_kv_heads": 2},
    ),
    "key-value heads of one head": (
        {"model.num_heads": 1, "model.num_kv_heads": 2},
        (
            "model.num_kv_heads (2)",
            "model.num_heads (1)",
            "1",
        ),
        {"model.num_kv_heads": 1},
    ),
    "more experts per token than there are": (
        {"model.moe.experts_per_token": 9},
        (
            "model.moe.experts_per_token (9)",
            "model.moe.num_experts (8)",
        ),
        {"model.moe.experts_per_token": 8},
    ),
    "dense layers": (
        {"model.moe.num_dense_layers": 5},
        (
            "model.moe.num_dense_layers (5)",
            "model.num_layers (4)",
            "4",
            "dense",
        ),
        {"model.moe.num_dense_layers": 4},
    ),
    "an interval beyond the last layer": (
        {"model.moe.moe_layer_interval": 5},
        (
            "model.moe.moe_layer_interval (5)",
            "none",
            "model.num_layers (4)",
            "model.moe.num_dense_layers (0)",
            "1",
            "4",
            "num_dense_layers=4",
            "none",
        ),
        {"model.moe.moe_layer_interval": 4},
    ),
    "an interval whose layers are all dense": (
        {"model.moe.moe_layer_interval": 3, "model.moe.num_dense_layers": 3},
        (
            "model.moe.moe_layer_interval (3)",
            "none",
            "model.num_layers (4)",
            "model.moe.num_dense_layers (3)",
            "1",
            "4",
            "num_dense_layers=4",
            "none",
        ),
        {"model.moe.num_dense_layers": 4},
    ),
    "width of shared experts without any": (
        {"model.moe.shared_expert_hidden_size": 512},
        (
            "model.moe.shared_expert_hidden_size (512)",
            "model.moe.num_shared_experts",
            "0",
            "remove",
        ),
        {"model.moe.num_shared_experts": 1},
    ),
    "gate of shared experts without any": (
        {"model.moe.shared_expert_gate": True},
        (
            "model.moe.shared_expert_gate (true)",
            "model.moe.num_shared_experts",
            "0",
            "remove",
        ),
        {"model.moe.num_shared_experts": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_setting_value_rule_and_way_out(case):
    settings, parts, _ = CASES[case]
    assert_one_message(messages(settings), parts)


@pytest.mark.parametrize("case", CASES)
def test_way_out_repairs_the_settings(case):
    settings, _, repaired = CASES[case]
    assert messages(settings | repaired) == []


def test_model_made_in_python_can_be_checked():
    check_model(ModelConfig())
    with pytest.raises(ConfigError, match=r"^model\.num_kv_heads \(3\) must divide"):
        check_model(ModelConfig(num_kv_heads=3))


@pytest.mark.parametrize(
    ("interval", "num_dense", "layers"),
    [
        (1, 0, (0, 1, 2, 3, 4, 5)),
        (1, 2, (2, 3, 4, 5)),
        (2, 0, (1, 3, 5)),
        (2, 2, (3, 5)),
        (3, 1, (2, 5)),
        (6, 5, (5,)),
        (1, 6, ()),
    ],
)
def test_every_nth_layer_beyond_the_first_dense_ones_has_experts(interval, num_dense, layers):
    settings = {
        "model.num_layers": 6,
        "model.moe.moe_layer_interval": interval,
        "model.moe.num_dense_layers": num_dense,
    }
    config = build(settings).model
    assert broken_rules(build(settings)) == []
    assert moe_layers(config) == layers
    for layer in range(6):
        assert ("expert_input" in layer_sites(config, layer)) == (layer in layers) == has_experts(config, layer)
        assert ("dense_input" in layer_sites(config, layer)) != (layer in layers)


@given(st.integers(1, 5000))
def test_all_divisors_are_returned_in_increasing_order(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_a_vocabulary_is_padded_to_the_next_multiple_of_8_and_a_multiple_stays():
    assert [padded_vocabulary(size) for size in (1, 7, 8, 9, 257, 264)] == [8, 8, 8, 16, 264, 264]
