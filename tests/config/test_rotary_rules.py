"""Rules about scaled rotary frequencies: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from tests.config.settings_by_path import messages
from tests.support.messages import assert_one_message

LLAMA3 = {"model.rope_scaling.type": "llama3", "model.rope_scaling.original_length": 8192}
YARN = LLAMA3 | {"model.rope_scaling.type": "yarn"}
CASES = {
    "a factor without a type": (
        {"model.rope_scaling.factor": 8.0},
        ("model.rope_scaling.factor (8.0)", "model.rope_scaling.type", "none", "remove", "linear", "llama3"),
        {"model.rope_scaling.type": "linear"},
    ),
    "a length that linear does not use": (
        {"model.rope_scaling.type": "linear", "model.rope_scaling.original_length": 8192},
        ("model.rope_scaling.original_length (8192)", "model.rope_scaling.type", "linear", "remove", "llama3"),
        {"model.rope_scaling.original_length": None},
    ),
    "llama3 without a length": (
        {"model.rope_scaling.type": "llama3"},
        ("model.rope_scaling.original_length (null)", "model.rope_scaling.type", "llama3", "set it"),
        {"model.rope_scaling.original_length": 8192},
    ),
    "factors in the wrong order": (
        LLAMA3 | {"model.rope_scaling.low_frequency_factor": 4.0},
        ("model.rope_scaling.low_frequency_factor (4.0)", "model.rope_scaling.high_frequency_factor (4.0)", "lower"),
        {"model.rope_scaling.low_frequency_factor": 3.9},
    ),
    "numbers of turns in the wrong order": (
        YARN | {"model.rope_scaling.beta_slow": 40.0},
        ("model.rope_scaling.beta_slow (40.0)", "model.rope_scaling.beta_fast (32.0)", "lower"),
        {"model.rope_scaling.beta_slow": 31.0},
    ),
    "a base without a logarithm": (
        YARN | {"model.rope_theta": 1.0},
        ("model.rope_theta (1.0)", "above 1", "model.rope_scaling.type", "yarn", "raise it"),
        {"model.rope_theta": 100.0},
    ),
    "scores of ordinary attention": (
        YARN | {"model.rope_scaling.score_factor": 1.5},
        ("model.rope_scaling.score_factor (1.5)", "key_value_rank is null", "model.rope_scaling.attention_factor"),
        {"model.rope_scaling.score_factor": 1.0, "model.rope_scaling.attention_factor": 1.2},
    ),
    "an attention factor of llama3": (
        LLAMA3 | {"model.rope_scaling.attention_factor": 1.5},
        ("model.rope_scaling.attention_factor (1.5)", "model.rope_scaling.type", "llama3", "remove", "yarn"),
        {"model.rope_scaling.attention_factor": None},
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
