"""Rules of the Q-Sparse settings beyond S itself: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest

from qsparse_moe.config.rules import broken_rules
from qsparse_moe.config.schema import RunConfig


def messages(settings: dict[str, object]) -> list[str]:
    tree: dict = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        holder = tree
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[name] = value
    return [problem.message for problem in broken_rules(RunConfig.model_validate(tree))]


# Broken settings, the message, and a change that mends them.
CASES: dict[str, tuple[dict, str, dict]] = {
    "a format for a site that is not there": (
        {"model.sparsity.quantization.sites.shared_input": "int4"},
        "model.sparsity.quantization.sites.shared_input (int4) selects nothing: model.moe.num_shared_experts is 0; "
        "remove it, or choose from attention_input, attention_output, expert_input, expert_hidden",
        {"model.moe.num_shared_experts": 1},
    ),
    "thresholds without a plan": (
        {"model.sparsity.selection": "threshold", "model.sparsity.default": 0.5},
        "model.sparsity.selection (threshold) needs calibrated thresholds, and model.sparsity.plan is null; name a "
        "plan made by qsparse-moe calibrate, or choose topk, block or statistical",
        {"model.sparsity.selection": "statistical"},
    ),
    "a ramp with thresholds": (
        {
            "model.sparsity.selection": "threshold",
            "model.sparsity.schedule.shape": "linear",
            "model.sparsity.schedule.ramp_steps": 10,
        },
        "model.sparsity.schedule.ramp_steps (10) must be 0 when model.sparsity.selection is threshold, because a "
        "threshold is calibrated for one S; remove it, or choose topk, block or statistical",
        {"model.sparsity.schedule.shape": "constant", "model.sparsity.schedule.ramp_steps": 0},
    ),
    "a ramp for relu": (
        {
            "model.sparsity.selection": "relu",
            "model.sparsity.schedule.shape": "linear",
            "model.sparsity.schedule.ramp_steps": 10,
        },
        "model.sparsity.schedule.ramp_steps (10) must be 0 when model.sparsity.selection is relu, because it keeps "
        "what is positive whatever S is; remove it, or choose topk, block or statistical",
        {"model.sparsity.schedule.shape": "constant", "model.sparsity.schedule.ramp_steps": 0},
    ),
    "a blend that is not used": (
        {"model.sparsity.blend.end": 0.5},
        "model.sparsity.blend.end (0.5) has no meaning when model.sparsity.gradient is ste; remove it, or choose blend",
        {"model.sparsity.gradient": "blend", "model.sparsity.blend.ramp_steps": 10},
    ),
    "a blend that jumps": (
        {"model.sparsity.gradient": "blend"},
        "model.sparsity.blend.ramp_steps (0) must be at least 1 when model.sparsity.gradient is blend, to get from "
        "model.sparsity.blend.start (1.0) to model.sparsity.blend.end (0.0); set it, or set the two alike",
        {"model.sparsity.blend.end": 1.0},
    ),
    "a blend that never ends": (
        {
            "model.sparsity.gradient": "blend",
            "model.sparsity.blend.ramp_steps": 80,
            "model.sparsity.blend.hold_steps": 30,
            "training.steps": 100,
        },
        "model.sparsity.blend.hold_steps (30) and model.sparsity.blend.ramp_steps (80) together must be at most "
        "training.steps (100), or the gradient never reaches its end; shorten them or train for at least 110 steps",
        {"training.steps": 110},
    ),
    "a plan that is not there": (
        {"model.sparsity.plan": "no/plan.json"},
        "model.sparsity.plan (no/plan.json) must name a file that exists, written by SparsityPlan.save; mend the path, "
        "which counts from the working directory, or remove the setting",
        {"model.sparsity.plan": __file__},
    ),
    "a preset beside a plan": (
        {"model.sparsity.plan": __file__, "model.sparsity.preset": "paper"},
        f'model.sparsity.preset ("paper") must be unset beside model.sparsity.plan ({__file__}), which holds S for '
        "every place; remove the one or the other",
        {"model.sparsity.preset": None},
    ),
    "a preset that keeps less than one of a group": (
        {"model.sparsity.preset": "a4.8", "model.sparsity.selection": "block", "model.sparsity.group_size": 1},
        "model.sparsity.preset (0.5) keeps 0.5 of a group's 1 features (model.sparsity.group_size), and at least 1 "
        "must be kept; use at most 0 or larger groups",
        {"model.sparsity.group_size": 2},
    ),
    "S beside a plan": (
        {"model.sparsity.plan": __file__, "model.sparsity.sites.expert_hidden": 0.5},
        f"model.sparsity.sites.expert_hidden (0.5) must be unset beside model.sparsity.plan ({__file__}), which holds "
        "S for every place; remove the one or the other",
        {"model.sparsity.plan": None},
    ),
}


@pytest.mark.parametrize(("broken", "message", "change"), CASES.values(), ids=CASES.keys())
def test_broken_rule_is_told_and_its_way_out_works(broken, message, change):
    assert messages(broken) == [message]
    assert messages(broken | change) == []


def test_no_format_at_a_site_that_is_not_there_is_fine():
    assert messages({"model.sparsity.quantization.sites.shared_input": "none"}) == []
