"""All rules together: the defaults, settings exactly at the limit of a rule, and several problems in one message."""

from __future__ import annotations

import pytest

from qsparse_moe.config.rules import broken_rules, check_config
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from tests.config.settings_by_path import BLOCK, build, messages


def test_defaults_break_no_rule():
    assert broken_rules(RunConfig()) == []


# Settings that lie exactly at the border of a rule, on the side that it allows.
BORDERS = {
    "warm-up and decay take the whole run": {
        "training.steps": 100,
        "training.warmup_steps": 60,
        "training.learning_rate_schedule": "warmup_stable_decay",
        "training.decay_steps": 40,
    },
    "S reaches its target with the last step": {
        "training.steps": 100,
        "model.sparsity.default": 0.5,
        "model.sparsity.schedule.shape": "linear",
        "model.sparsity.schedule.warmup_steps": 60,
        "model.sparsity.schedule.ramp_steps": 40,
    },
    "the blend ends with the last step": {
        "training.steps": 100,
        "model.sparsity.gradient": "blend",
        "model.sparsity.blend.hold_steps": 60,
        "model.sparsity.blend.ramp_steps": 40,
    },
    "the profile ends with the last step": {
        "training.steps": 100,
        "metrics.profile_from": 91,
        "metrics.profile_steps": 10,
    },
    "the loss scale begins at its minimum": {
        "training.precision": "fp16",
        "training.loss_scale.initial_power": 4,
        "training.loss_scale.minimum": 16,
    },
    "a vocabulary of all bytes and the document token": {"model.vocab_size": 257},
    "every expert for every token": {"model.moe.num_experts": 4, "model.moe.experts_per_token": 4},
    "every layer is dense": {"model.num_layers": 3, "model.moe.num_dense_layers": 3},
    "every group for every token": {
        "model.moe.num_experts": 8,
        "model.moe.num_expert_groups": 4,
        "model.moe.groups_per_token": 4,
    },
    "the chosen groups hold the experts of a token and no more": {
        "model.moe.num_experts": 8,
        "model.moe.num_expert_groups": 4,
        "model.moe.groups_per_token": 2,
        "model.moe.experts_per_token": 4,
    },
    "groups of two experts that are scored by the two best": {
        "model.moe.num_experts": 8,
        "model.moe.num_expert_groups": 4,
        "model.moe.groups_per_token": 2,
        "model.moe.group_score": "top2_sum",
    },
    "groups with one selected feature": BLOCK
    | {"model.sparsity.default": 0.9, "model.sparsity.group_size": 8, "model.moe.expert_hidden_size": 64},
}


@pytest.mark.parametrize("case", BORDERS)
def test_settings_at_the_limit_of_a_rule_are_accepted(case):
    assert messages(BORDERS[case]) == []


def test_a_broken_rule_does_not_hide_another():
    assert len(messages({"model.num_kv_heads": 3, "model.moe.experts_per_token": 9, "model.vocab_size": 1})) == 3


def test_config_made_in_python_can_be_checked():
    check_config(RunConfig())
    with pytest.raises(ConfigError, match=r"^the config breaks 2 rules:\n  model\.vocab_size .*\n  training"):
        check_config(build({"model.vocab_size": 256, "training.global_batch_size": 3}))
