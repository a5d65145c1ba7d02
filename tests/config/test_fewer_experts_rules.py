"""Rules of the settings for fewer experts per token: every message is produced here, and its way out is tried."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.config.settings_by_path import build, messages
from tests.support.messages import assert_one_message

_S = "model.sparsity"
_DENSE = {"model.num_layers": 4, "model.moe.num_dense_layers": 4}
# Broken settings; the parts of the message in order; and a change that repairs them.
CASES: dict[str, tuple[dict, tuple[str, ...], dict]] = {
    "more experts than the router chooses": (
        {f"{_S}.experts_per_token": 3, "model.moe.experts_per_token": 2},
        (f"{_S}.experts_per_token (3)", "at most model.moe.experts_per_token (2)", "lower", "raise"),
        {"model.moe.experts_per_token": 3},
    ),
    "more experts in one layer": (
        {f"{_S}.routing_overrides": ({"layers": 1, "experts_per_token": 5},), "model.moe.experts_per_token": 2},
        (f"{_S}.routing_overrides.0.experts_per_token (5)", "at most model.moe.experts_per_token (2)"),
        {f"{_S}.routing_overrides": ({"layers": 1, "experts_per_token": 2},)},
    ),
    "a model without experts": (
        _DENSE | {f"{_S}.top_p": 0.5},
        (f"{_S}.top_p (0.5)", "every layer is dense", "model.moe.num_dense_layers is 4", "remove"),
        {"model.moe.num_dense_layers": 3},
    ),
    "an override without a change": (
        {f"{_S}.routing_overrides": ({"layers": 1},)},
        (f"{_S}.routing_overrides.0 changes nothing", "experts_per_token or top_p", "remove"),
        {f"{_S}.routing_overrides": ()},
    ),
    "a layer that does not exist": (
        {f"{_S}.routing_overrides": ({"layers": 9, "top_p": 0.5},), "model.num_layers": 4},
        (f"{_S}.routing_overrides.0.layers (9)", "valid indices are 0-3"),
        {"model.num_layers": 10},
    ),
    "a layer without experts": (
        {f"{_S}.routing_overrides": ({"layers": "0-1", "top_p": 0.5},), "model.moe.num_dense_layers": 2},
        (f'{_S}.routing_overrides.0.layers ("0-1")', "selects no layer with experts", "2", "3"),
        {"model.moe.num_dense_layers": 1},
    ),
}


@pytest.mark.parametrize(("settings", "parts", "repair"), CASES.values(), ids=CASES)
def test_a_broken_rule_names_settings_values_rule_and_a_way_out_that_works(settings, parts, repair):
    assert_one_message(messages(settings), parts)
    assert messages(settings | repair) == []


def test_a_plan_file_and_settings_for_experts_exclude_each_other(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    given = {f"{_S}.plan": str(tmp_path / "plan.json")}
    for name, value in (("experts_per_token", 1), ("top_p", 0.5), ("routing_overrides", ({"top_p": 0.5},))):
        path = f"{_S}.{name}" if name != "routing_overrides" else f"{_S}.{name}.0"
        assert_one_message(messages(given | {f"{_S}.{name}": value}), (path, "must be unset", "plan.json", "remove"))
    assert messages(given) == []


@pytest.mark.parametrize(
    ("name", "value"), [("experts_per_token", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_p", -0.5)]
)
def test_a_value_out_of_its_range_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        build({f"{_S}.{name}": value})
