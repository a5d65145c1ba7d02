"""The paths of a problem: by them a rule about an invalid setting is left out, so they are those that it names."""

from __future__ import annotations

import re

import pytest

from qsparse_moe.config.fields import all_settings
from qsparse_moe.config.rules import broken_rules
from tests.config import (
    test_attention_rules,
    test_data_rules,
    test_group_rules,
    test_model_rules,
    test_rotary_rules,
    test_router_rules,
    test_sparsity_rules,
    test_training_rules,
)
from tests.config.settings_by_path import build

MODULES = (
    test_attention_rules,
    test_data_rules,
    test_group_rules,
    test_model_rules,
    test_rotary_rules,
    test_router_rules,
    test_sparsity_rules,
    test_training_rules,
)
CASES = {
    f"{module.__name__.rsplit('.', 1)[1]}: {name}": case for module in MODULES for name, case in module.CASES.items()
}
KNOWN = {path for path, _ in all_settings()}


@pytest.mark.parametrize("case", CASES)
def test_a_problem_has_the_paths_of_the_settings_that_break_its_rule(case):
    """Every setting that the message names together with its value is one of the paths."""
    settings, *_ = CASES[case]
    (problem,) = broken_rules(build(settings))
    named = {path for path in re.findall(r"([a-z_0-9.]+) \(", problem.message) if path in KNOWN}
    assert not named - set(problem.paths)


def test_a_rule_about_groups_is_not_checked_with_the_default_number_of_experts(error_of):
    # Of the default of 8 experts, 4 groups would leave too few for 5 experts per token.
    groups = "num_expert_groups: 4, groups_per_token: 2, experts_per_token: 5"
    message = error_of(f"model: {{moe: {{num_experts: many, {groups}}}}}")
    assert message.startswith('model.moe.num_experts ("many")') and "\n" not in message
