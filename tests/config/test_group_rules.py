"""Rules about ramps of S and about groups of features: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from tests.config.settings_by_path import BLOCK, messages
from tests.support.messages import assert_one_message

# Broken settings; the parts of the message in order (settings with values, the numbers of the rule, the way out); and a
# change that repairs them.
CASES = {
    "ramp of a constant schedule": (
        {"model.sparsity.schedule.ramp_steps": 10},
        (
            "model.sparsity.schedule.ramp_steps (10)",
            "0",
            "model.sparsity.schedule.shape",
            "constant",
            "remove",
            "linear",
            "cubic",
            "cosine",
        ),
        {"model.sparsity.schedule.shape": "cubic"},
    ),
    "schedule without its ramp": (
        {"model.sparsity.schedule.shape": "linear"},
        (
            "model.sparsity.schedule.ramp_steps (0)",
            "1",
            "model.sparsity.schedule.shape",
            "linear",
            "constant",
        ),
        {"model.sparsity.schedule.ramp_steps": 10},
    ),
    "ramp beyond the end": (
        {
            "model.sparsity.schedule.shape": "linear",
            "model.sparsity.schedule.ramp_steps": 80,
            "model.sparsity.schedule.warmup_steps": 30,
            "training.steps": 100,
        },
        (
            "model.sparsity.schedule.warmup_steps (30)",
            "model.sparsity.schedule.ramp_steps (80)",
            "training.steps (100)",
            "110",
        ),
        {"training.steps": 110},
    ),
    "groups that do not divide the width": (
        BLOCK | {"model.sparsity.group_size": 48, "model.moe.expert_hidden_size": 192},
        (
            "model.sparsity.group_size (48)",
            "model.hidden_size (128)",
            "attention_input",
            "attention_output",
            "expert_input",
            "32",
            "64",
        ),
        {"model.sparsity.group_size": 64},
    ),
    "groups that do not divide an expert": (
        BLOCK | {"model.moe.expert_hidden_size": 200},
        (
            "model.sparsity.group_size (32)",
            "model.moe.expert_hidden_size (200)",
            "expert_hidden",
            "25",
            "40",
        ),
        {"model.sparsity.sites.expert_hidden": 0},
    ),
    "groups that do not divide the heads": (
        BLOCK | {"model.head_size": 20},
        (
            "model.sparsity.group_size (32)",
            "model.num_heads",
            "model.head_size (80)",
            "attention_output",
            "20",
            "40",
        ),
        {"model.sparsity.overrides": [{"sparsity": 0.0, "site": "attention_output"}]},
    ),
    "groups that do not divide the shared experts": (
        BLOCK
        | {"model.sparsity.group_size": 128, "model.moe.num_shared_experts": 3, "model.moe.expert_hidden_size": 64}
        # Only the shared experts are sparse.
        | {"model.sparsity.default": 0.0, "model.sparsity.sites.shared_hidden": 0.5},
        (
            "model.sparsity.group_size (128)",
            "model.moe.num_shared_experts",
            "model.moe.expert_hidden_size (192)",
            "shared_hidden",
            "64",
            "96",
        ),
        {"model.moe.num_shared_experts": 2},
    ),
    "groups that do not divide the shared experts of their own width": (
        BLOCK | {"model.moe.num_shared_experts": 1, "model.moe.shared_expert_hidden_size": 100},
        (
            "model.sparsity.group_size (32)",
            "model.moe.shared_expert_hidden_size (100)",
            "shared_hidden",
            "20",
            "25",
        ),
        {"model.moe.shared_expert_hidden_size": 96},
    ),
    "groups that do not divide a dense layer": (
        BLOCK | {"model.moe.num_dense_layers": 1, "model.moe.dense_hidden_size": 100},
        (
            "model.sparsity.group_size (32)",
            "model.moe.dense_hidden_size (100)",
            "dense_hidden",
            "20",
            "25",
        ),
        {"model.moe.dense_hidden_size": 96},
    ),
    "groups without a selected feature": (
        BLOCK | {"model.sparsity.default": 0.99},
        (
            "model.sparsity.default (0.99)",
            "0.32",
            "32",
            "model.sparsity.group_size",
            "1",
            "0.96875",
        ),
        {"model.sparsity.default": 0.96875},
    ),
    "groups without a selected feature at a site": (
        BLOCK | {"model.sparsity.group_size": 4, "model.sparsity.sites.expert_hidden": 0.9},
        (
            "model.sparsity.sites.expert_hidden (0.9)",
            "0.4",
            "4",
            "model.sparsity.group_size",
            "1",
            "0.75",
        ),
        {"model.sparsity.group_size": 8},
    ),
    "groups without a selected feature in an override": (
        BLOCK | {"model.sparsity.overrides": [{"sparsity": 0.99}]},
        (
            "model.sparsity.overrides.0.sparsity (0.99)",
            "0.32",
            "32",
            "model.sparsity.group_size",
            "1",
            "0.96875",
        ),
        {"model.sparsity.selection": "topk"},
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


def test_groups_matter_only_where_something_is_selected():
    dense = {"model.sparsity.selection": "block", "model.sparsity.group_size": 7}
    assert messages(dense) == []
    assert messages(dense | {"model.sparsity.sites.expert_hidden": 0.5, "model.moe.expert_hidden_size": 21}) == []
