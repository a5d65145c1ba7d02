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
}


@pytest.mark.parametrize(("broken", "message", "change"), CASES.values(), ids=CASES.keys())
def test_broken_rule_is_told_and_its_way_out_works(broken, message, change):
    assert messages(broken) == [message]
    assert messages(broken | change) == []


def test_no_format_at_a_site_that_is_not_there_is_fine():
    assert messages({"model.sparsity.quantization.sites.shared_input": "none"}) == []
