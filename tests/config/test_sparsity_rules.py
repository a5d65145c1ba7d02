"""Rules of the Q-Sparse settings beyond S itself: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from tests.config.settings_by_path import messages
from tests.support.messages import assert_one_message

# Broken settings; the parts of the message in order (settings with values, the numbers of the rule, the way out); and a
# change that repairs them.
CASES: dict[str, tuple[dict, tuple[str, ...], dict]] = {
    "a format for an absent site": (
        {"model.sparsity.quantization.sites.shared_input": "int4"},
        (
            "model.sparsity.quantization.sites.shared_input (int4)",
            "model.moe.num_shared_experts",
            "0",
            "remove",
            "attention_input",
            "attention_output",
            "expert_input",
            "expert_hidden",
        ),
        {"model.moe.num_shared_experts": 1},
    ),
    "thresholds without a plan": (
        {"model.sparsity.selection": "threshold", "model.sparsity.default": 0.5},
        (
            "model.sparsity.selection (threshold)",
            "model.sparsity.plan",
            "null",
            "topk",
            "block",
            "statistical",
        ),
        {"model.sparsity.selection": "statistical"},
    ),
    "a ramp with thresholds": (
        {
            "model.sparsity.selection": "threshold",
            "model.sparsity.schedule.shape": "linear",
            "model.sparsity.schedule.ramp_steps": 10,
        },
        (
            "model.sparsity.schedule.ramp_steps (10)",
            "0",
            "model.sparsity.selection",
            "threshold",
            "threshold",
            "remove",
            "topk",
            "block",
            "statistical",
        ),
        {"model.sparsity.schedule.shape": "constant", "model.sparsity.schedule.ramp_steps": 0},
    ),
    "a ramp for relu": (
        {
            "model.sparsity.selection": "relu",
            "model.sparsity.schedule.shape": "linear",
            "model.sparsity.schedule.ramp_steps": 10,
        },
        (
            "model.sparsity.schedule.ramp_steps (10)",
            "0",
            "model.sparsity.selection",
            "relu",
            "remove",
            "topk",
            "block",
            "statistical",
        ),
        {"model.sparsity.schedule.shape": "constant", "model.sparsity.schedule.ramp_steps": 0},
    ),
    "a blend that is not used": (
        {"model.sparsity.blend.end": 0.5},
        (
            "model.sparsity.blend.end (0.5)",
            "model.sparsity.gradient",
            "ste",
            "remove",
            "blend",
        ),
        {"model.sparsity.gradient": "blend", "model.sparsity.blend.ramp_steps": 10},
    ),
    "a blend that jumps": (
        {"model.sparsity.gradient": "blend"},
        (
            "model.sparsity.blend.ramp_steps (0)",
            "1",
            "model.sparsity.gradient",
            "blend",
            "model.sparsity.blend.start (1.0)",
            "model.sparsity.blend.end (0.0)",
        ),
        {"model.sparsity.blend.end": 1.0},
    ),
    "a blend that never ends": (
        {
            "model.sparsity.gradient": "blend",
            "model.sparsity.blend.ramp_steps": 80,
            "model.sparsity.blend.hold_steps": 30,
            "training.steps": 100,
        },
        (
            "model.sparsity.blend.hold_steps (30)",
            "model.sparsity.blend.ramp_steps (80)",
            "training.steps (100)",
            "110",
        ),
        {"training.steps": 110},
    ),
    "a missing plan": (
        {"model.sparsity.plan": "no/plan.json"},
        (
            "model.sparsity.plan (no/plan.json)",
            "lan.save",
            "remove",
        ),
        {"model.sparsity.plan": __file__},
    ),
    "a preset beside a plan": (
        {"model.sparsity.plan": __file__, "model.sparsity.preset": "paper"},
        (
            'model.sparsity.preset ("paper")',
            f"model.sparsity.plan ({__file__})",
            "remove",
        ),
        {"model.sparsity.preset": None},
    ),
    "a preset that selects less than one feature of a group": (
        {"model.sparsity.preset": "a4.8", "model.sparsity.selection": "block", "model.sparsity.group_size": 1},
        (
            "model.sparsity.preset (0.5)",
            "0.5",
            "1",
            "model.sparsity.group_size",
            "1",
            "0",
        ),
        {"model.sparsity.group_size": 2},
    ),
    "S beside a plan": (
        {"model.sparsity.plan": __file__, "model.sparsity.sites.expert_hidden": 0.5},
        (
            "model.sparsity.sites.expert_hidden (0.5)",
            f"model.sparsity.plan ({__file__})",
            "remove",
        ),
        {"model.sparsity.plan": None},
    ),
}


@pytest.mark.parametrize(("broken", "parts", "change"), CASES.values(), ids=CASES.keys())
def test_broken_rule_is_reported_and_its_way_out_works(broken, parts, change):
    assert_one_message(messages(broken), parts)
    assert messages(broken | change) == []


def test_no_format_at_an_absent_site_is_accepted():
    assert messages({"model.sparsity.quantization.sites.shared_input": "none"}) == []


def test_every_value_of_s_beside_a_plan_is_refused():
    settings = {
        "model.sparsity.plan": __file__,
        "model.sparsity.preset": "dense",
        "model.sparsity.default": 0.0,
        "model.sparsity.sites.expert_input": 0.0,
        "model.sparsity.sites.attention_output": 0.5,
        "model.sparsity.overrides": [{"sparsity": 0.0, "layers": 1}, {"sparsity": 0.25}],
    }
    path = "model.sparsity"
    assert [message.split(" must be unset")[0] for message in messages(settings)] == [
        f'{path}.preset ("dense")',
        f"{path}.default (0.0)",
        f"{path}.sites.attention_output (0.5)",
        f"{path}.sites.expert_input (0.0)",
        f"{path}.overrides.0.sparsity (0.0)",
        f"{path}.overrides.1.sparsity (0.25)",
    ]


@pytest.mark.parametrize(
    ("sparsity", "group", "refused"),
    [(0.5, 1, True), (0.49, 1, False), (0.9, 5, True), (0.89, 5, False), (0.75, 2, True), (0.875, 4, True)],
)
def test_half_a_feature_of_a_group_rounds_to_none(sparsity, group, refused):
    block = {"model.sparsity.selection": "block", "model.sparsity.group_size": group, "model.hidden_size": 120}
    found = messages(block | {"model.moe.expert_hidden_size": 60, "model.sparsity.default": sparsity})
    assert len(found) == refused
    assert all(f"use at most {1 - 1 / group:.6g}, or larger groups" in message for message in found)


@pytest.mark.parametrize("selection", ["topk", "block", "statistical"])
def test_a_selection_by_rank_or_statistics_may_have_a_ramp(selection):
    ramp = {"model.sparsity.schedule.shape": "linear", "model.sparsity.schedule.ramp_steps": 10}
    assert messages(ramp | {"model.sparsity.selection": selection, "model.sparsity.default": 0.5}) == []


def test_every_changed_setting_of_an_unused_blend_is_reported_and_an_equal_start_and_end_need_no_ramp():
    path = "model.sparsity.blend"
    found = messages({f"{path}.start": 0.75, f"{path}.hold_steps": 3, f"{path}.ramp_steps": 4})
    assert {message.split(" has no meaning")[0] for message in found} == {
        f"{path}.start (0.75)", f"{path}.hold_steps (3)", f"{path}.ramp_steps (4)",
    }  # fmt: skip
    assert messages({"model.sparsity.gradient": "blend", f"{path}.start": 0.5, f"{path}.end": 0.5}) == []
