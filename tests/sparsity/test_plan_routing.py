"""Experts per token in a sparsity plan: JSON of every version, changes, the schedule, and what does not fit."""

from __future__ import annotations

import json

import pytest

from qsparse_moe.ablation.cells import Cell, with_cells
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan


def model(sparsity=None, **moe):
    names = {"num_experts": 4, "experts_per_token": 3, "num_dense_layers": 1} | moe
    return ModelConfig.model_validate({"num_layers": 4, "moe": names, "sparsity": sparsity or {}}, strict=False)


PLAN = SparsityPlan.uniform(model(), 0.5).with_experts({1: 0, 3: 2}).with_top_p({2: 0.75, 3: 0.5})


def test_a_layer_without_an_entry_uses_the_experts_of_the_model():
    assert [PLAN.experts(layer, 3) for layer in (1, 2, 3)] == [0, 3, 2]
    assert PLAN.top_p == {2: 0.75, 3: 0.5}


def test_settings_give_layers_their_experts_and_later_overrides_win():
    settings = {
        "experts_per_token": 2,
        "top_p": 0.9,
        "routing_overrides": [
            {"layers": "0-2", "experts_per_token": 1},
            {"layers": 2, "experts_per_token": 0},
            {"layers": [3], "top_p": 1.0},
        ],
    }
    plan = SparsityPlan.from_config(model(sparsity=settings))
    assert plan.experts_per_token == {1: 1, 2: 0, 3: 2} and plan.top_p == {1: 0.9, 2: 0.9, 3: 1.0}
    plan = SparsityPlan.from_config(model(sparsity={"routing_overrides": [{"layers": 3, "experts_per_token": 1}]}))
    assert plan.experts_per_token == {3: 1} and plan.top_p == {}


def test_json_keeps_both_halves_and_earlier_versions_are_read_with_the_experts_of_the_model(tmp_path):
    assert SparsityPlan.from_json(PLAN.to_json()) == PLAN
    content = json.loads(PLAN.to_json())
    assert content["routing"] == [
        {"layer": 1, "experts_per_token": 0},
        {"layer": 2, "top_p": 0.75},
        {"layer": 3, "experts_per_token": 2, "top_p": 0.5},
    ]
    del content["routing"]
    for version in (1, 2):
        content["format"] = f"qsparse_moe.sparsity_plan/{version}"
        old = SparsityPlan.from_json(json.dumps(content))
        assert old == SparsityPlan.uniform(model(), 0.5) and old.experts(1, 3) == 3
    content["format"] = "qsparse_moe.sparsity_plan/4"
    with pytest.raises(ConfigError, match=r"format is '.*/4'; this version reads .*/1', .*/2', .*/3'; write it again"):
        SparsityPlan.from_json(json.dumps(content))


@pytest.mark.parametrize("routing", [5, [7], [{"experts_per_token": 1}], [{"layer": 1, "top_p": "much"}]])
def test_a_damaged_routing_half_is_not_readable(routing):
    with pytest.raises(ConfigError, match="sparsity plan: not readable"):
        SparsityPlan.from_json(json.dumps(json.loads(PLAN.to_json()) | {"routing": routing}))


def test_a_change_of_one_half_leaves_the_other():
    thresholds = {place: (0.1,) * len(values) for place, values in PLAN.values.items()}
    for changed in (
        PLAN.with_(sparsity=0.2),
        with_cells(PLAN, {Cell(1, "expert_hidden", 2): 0.9}),
        PLAN.with_thresholds(thresholds),
    ):
        assert (changed.experts_per_token, changed.top_p) == (PLAN.experts_per_token, PLAN.top_p)
    changed = PLAN.with_thresholds(thresholds).with_experts({1: 2}).with_top_p({2: 1.0})
    assert changed.experts_per_token == {1: 2, 3: 2} and changed.top_p == {2: 1.0, 3: 0.5}
    assert changed.values == PLAN.values and changed.thresholds == thresholds


def test_the_schedule_moves_from_the_experts_of_the_model_to_those_of_the_plan():
    plan = SparsityPlan.uniform(model(), 0.5).with_experts({1: 0, 2: 2}).with_top_p({2: 0.6})
    dense = plan.scaled(0.0, 3)
    assert dense.experts_per_token == {} and dense.top_p == {2: 1.0} and dense.mean == 0
    assert [plan.scaled(scale, 3).experts(1, 3) for scale in (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)] == [
        3,
        2,
        2,
        1,
        1,
        0,
        0,
    ]
    assert plan.scaled(0.5, 3).top_p == {2: pytest.approx(0.8)}
    assert plan.scaled(1.0) is plan
    assert SparsityPlan.uniform(model(), 0.5).scaled(0.5).experts_per_token == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": {1: -1}}, "layer 1 has experts_per_token -1; it must be a whole number of at least 0"),
        ({"experts_per_token": {1: 1.5}}, "layer 1 has experts_per_token 1.5; it must be a whole number"),
        ({"experts_per_token": {1: True}}, "layer 1 has experts_per_token True"),
        ({"top_p": {2: 0.0}}, r"layer 2 has top_p 0.0; it must lie in \(0, 1\].* set experts_per_token to 0"),
        ({"top_p": {2: -0.5}}, r"layer 2 has top_p -0.5; it must lie in \(0, 1\]"),
        ({"top_p": {2: 1.01}}, r"layer 2 has top_p 1.01; it must lie in \(0, 1\]"),
        ({"top_p": {2: float("nan")}}, "layer 2 has top_p nan"),
        ({"experts_per_token": {0: 1}}, r"experts_per_token names the layers \[0\], .* name layers of \[1, 2, 3\]"),
        ({"top_p": {9: 0.5, 0: 0.5}}, r"top_p names the layers \[0, 9\], which have no routed experts"),
    ],
)
def test_an_impossible_number_of_experts_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SparsityPlan(PLAN.values, **change)


def test_a_plan_with_more_experts_than_the_model_does_not_fit_it():
    PLAN.check_fits(model())
    with pytest.raises(
        ConfigError, match=r"layer 3 has experts_per_token 2, .* at most the model.moe.experts_per_token \(1\)"
    ):
        PLAN.check_fits(model(experts_per_token=1))
