"""A plan changed at named sites: the new values, and the message for a site that does not exist."""

from __future__ import annotations

import pytest

from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan

PLAN = SparsityPlan(
    {(0, "attention_input"): (0.1,), (1, "expert_input"): (0.2, 0.3), (1, "expert_hidden"): (0.4, 0.5)},
    {(0, "attention_input"): (1.0,), (1, "expert_input"): (2.0, 3.0)},
)


def test_only_the_named_sites_change_and_lose_their_thresholds():
    changed = PLAN.with_(layer=1, site="expert_input", experts=[1], sparsity=0.75)
    assert changed.values == PLAN.values | {(1, "expert_input"): (0.2, 0.75)}
    assert changed.thresholds == {(0, "attention_input"): (1.0,)}
    assert PLAN.values[1, "expert_input"] == (0.2, 0.3)


def test_a_change_without_layers_or_experts_applies_to_all_of_them():
    assert set(PLAN.with_(sparsity=0.0).values.values()) == {(0.0,), (0.0, 0.0)}
    assert PLAN.with_(experts=[0], sparsity=0.9).values == {
        (0, "attention_input"): (0.1,),
        (1, "expert_input"): (0.9, 0.3),
        (1, "expert_hidden"): (0.9, 0.5),
    }


def test_the_mean_weighs_sites_not_experts():
    assert SparsityPlan({(0, "attention_input"): (0.0,), (0, "expert_input"): (0.8,) * 8}).mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"layer": 7}, r"layer 7, site None, experts None.*this plan has the layers \[0, 1\]"),
        ({"site": "nowhere"}, "site nowhere, .* with the sites attention_input, expert_input, expert_hidden"),
        ({"layer": 0, "experts": [0]}, "layer 0, .* per expert only at expert_hidden and expert_input"),
        ({"experts": [2]}, r"experts \[2\] are not in layer 1, expert_input; choose from 0-1"),
        ({"experts": [-1]}, r"experts \[-1\] are not in layer 1"),
        ({"layer": 0, "sparsity": 1.0}, r"each must lie in \[0, 1\)"),
    ],
)
def test_an_absent_site_is_named(places, message):
    with pytest.raises(ConfigError, match=message):
        PLAN.with_(**({"sparsity": 0.5} | places))
