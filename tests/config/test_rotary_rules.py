"""Rules about scaled rotary frequencies: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from tests.config.settings_by_path import messages
from tests.support.messages import assert_one_message

LLAMA3 = {"model.rope_scaling.type": "llama3", "model.rope_scaling.original_length": 8192}
YARN = LLAMA3 | {"model.rope_scaling.type": "yarn"}
# A value other than the default of every setting, and the types that use it.
USED = {
    "factor": (8.0, {"linear", "llama3", "yarn"}),
    "original_length": (4096, {"llama3", "yarn"}),
    "low_frequency_factor": (0.5, {"llama3"}),
    "high_frequency_factor": (5.0, {"llama3"}),
    "beta_slow": (0.5, {"yarn"}),
    "beta_fast": (33.0, {"yarn"}),
    "attention_factor": (1.5, {"yarn"}),
    "score_factor": (1.5, {"yarn"}),
}
LATENT_SIZES = {"key_value_rank": 12, "nope_head_size": 6, "rope_head_size": 4, "value_head_size": 10}
LATENT = {f"model.latent_attention.{name}": size for name, size in LATENT_SIZES.items()}
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


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("name", USED)
def test_every_type_uses_its_settings_and_refuses_the_others(kind, name):
    value, users = USED[name]
    # A length where the type requires one, and latent attention, which score_factor requires.
    needed = {"model.rope_scaling.original_length": 8192} if kind in ("llama3", "yarn") else {}
    found = messages(LATENT | {"model.rope_scaling.type": kind} | needed | {f"model.rope_scaling.{name}": value})
    assert len(found) == (kind not in users)
    start = f"model.rope_scaling.{name} ({value}) has no meaning when model.rope_scaling.type is {kind}; remove it, or "
    types = " or ".join(user for user in ("linear", "llama3", "yarn") if user in users)
    assert all(message == f"{start}choose {types}" for message in found)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_a_scaling_by_turns_requires_the_length_of_the_first_training(kind):
    (message,) = messages({"model.rope_scaling.type": kind})
    assert message.startswith("model.rope_scaling.original_length (null) must be the length of the first training when")


@pytest.mark.parametrize(
    ("kind", "theta", "number"), [("yarn", 1.0, 1), ("yarn", 0.5, 1), ("yarn", 1.5, 0), ("llama3", 1.0, 0)]
)
def test_only_yarn_needs_a_base_above_one(kind, theta, number):
    assert len(messages(YARN | {"model.rope_scaling.type": kind, "model.rope_theta": theta})) == number
