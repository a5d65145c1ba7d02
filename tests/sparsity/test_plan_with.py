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


def test_s_of_a_site_is_that_of_an_expert_or_the_mean_of_all():
    assert PLAN.sparsity(1, "expert_input") == 0.25
    assert [PLAN.sparsity(1, "expert_input", expert) for expert in (0, 1)] == [0.2, 0.3]
    assert PLAN.sparsity(0, "attention_input") == PLAN.sparsity(0, "attention_input", 0) == 0.1
    assert PLAN.sites(0) == ("attention_input",) and PLAN.sites(1) == ("expert_input", "expert_hidden")
    assert SparsityPlan({}).mean == 0.0


def test_experts_are_named_in_any_order_and_every_site_of_them_changes():
    plan = SparsityPlan({(2, "expert_hidden"): (0.1, 0.2, 0.3, 0.4), (5, "expert_hidden"): (0.5, 0.6, 0.7, 0.8)})
    assert plan.with_(experts=[3, 0], sparsity=0.9).values == {
        (2, "expert_hidden"): (0.9, 0.2, 0.3, 0.9),
        (5, "expert_hidden"): (0.9, 0.6, 0.7, 0.9),
    }
    assert plan.with_(experts=[3, 0], sparsity=0.9, layer=5).values[2, "expert_hidden"] == (0.1, 0.2, 0.3, 0.4)
    with pytest.raises(ConfigError, match=r"experts \[4, -1\] are not in layer 2, expert_hidden; choose from 0-3"):
        plan.with_(experts=[1, 4, -1, 2], sparsity=0.9)


def test_the_largest_s_is_below_1_and_the_smallest_threshold_0():
    place = (3, "dense_hidden")
    for sparsity in (-1e-9, 1.0):
        with pytest.raises(ConfigError, match=r"layer 3, dense_hidden has S = .*; each must lie in \[0, 1\)"):
            SparsityPlan({place: (0.5, sparsity)})
    plan = SparsityPlan({place: (0.0, 0.999)}, {place: (0.0, 7.0)})
    assert SparsityPlan.from_json(plan.to_json()) == plan
    with pytest.raises(ConfigError, match=r"there must be one for each of its 0 values of S"):
        SparsityPlan({}, {place: (0.5,)})
