"""SparsityPlan: from settings, selectors, JSON; K from S; the schedule."""

import pytest

from qsparse_moe.config.schema import SITES, ModelConfig, ScheduleConfig, SparsityConfig
from qsparse_moe.config.shapes import site_format
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan, num_selected, site_num_selected, site_threshold
from qsparse_moe.sparsity.plan_json import FORMAT
from qsparse_moe.sparsity.schedule import scheduled_scale, ste_share


def model(sparsity, **moe):
    return ModelConfig.model_validate(
        {"num_layers": 3, "moe": {"num_experts": 4, "num_dense_layers": 1, **moe}, "sparsity": sparsity}, strict=False
    )


@pytest.mark.parametrize(
    ("sparsity", "width", "kept"),
    [
        (0.0, 10, 10),
        (0.5, 10, 5),
        (0.999, 10, 1),
        (0.4, 768, 461),
        (0.55, 1, 1),
        (0.68, 10, 3),
        (0.5, 5, 2),
        (0.5, 7, 4),
    ],
)
def test_k_is_the_rounded_fraction_and_at_least_one(sparsity, width, kept):
    assert num_selected(sparsity, width) == kept


def test_sites_override_the_default_and_overrides_the_sites_in_order():
    plan = SparsityPlan.from_config(
        model(
            {
                "default": 0.1,
                "sites": {"expert_hidden": 0.5},
                "overrides": [
                    {"layers": "1-2", "site": "expert_hidden", "experts": [2], "sparsity": 0.75},
                    {"layers": 2, "sparsity": 0.2},
                ],
            }
        )
    )
    assert plan.values[1, "expert_hidden"] == (0.5, 0.5, 0.75, 0.5)
    assert plan.values[2, "expert_hidden"] == (0.2,) * 4
    assert plan.values[0, "dense_hidden"] == (0.1,)
    assert plan.sites(0) == ("attention_input", "attention_output", "dense_input", "dense_hidden")
    assert plan.sites(1) == ("attention_input", "attention_output", "expert_input", "expert_hidden")
    assert plan.sparsity(1, "expert_hidden", 2) == 0.75
    assert plan.sparsity(1, "expert_hidden") == pytest.approx(0.5625)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"layers": 3, "sparsity": 0.5}, r"overrides.0 layers \(3\) names 3; the valid indices are 0-2"),
        ({"experts": "2-4", "sparsity": 0.5}, r"overrides.0 experts \('2-4'\) names 4; the valid indices are 0-3"),
        ({"layers": "a-b", "sparsity": 0.5}, "neither an index"),
        ({"layers": 0, "site": "expert_input", "sparsity": 0.5}, "matches nothing; this model has layers 0-2"),
    ],
)
def test_a_selector_that_matches_nothing_says_what_exists(override, message):
    with pytest.raises(ConfigError, match=message):
        SparsityPlan.from_config(model({"overrides": [override]}))


def test_json_round_trip_and_its_errors():
    plan = SparsityPlan.from_config(model({"default": 0.3, "overrides": [{"experts": 1, "sparsity": 0.9}]}))
    assert SparsityPlan.from_json(plan.to_json()) == plan
    with pytest.raises(ConfigError, match="not readable"):
        SparsityPlan.from_json(plan.to_json()[:50])
    with pytest.raises(ConfigError, match="format is 'x/9'"):
        SparsityPlan.from_json(plan.to_json().replace(FORMAT, "x/9"))
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\)"):
        SparsityPlan({(0, "attention_input"): (1.0,)})


def test_a_plan_of_another_model_is_refused():
    plan = SparsityPlan.uniform(model({}), 0.5)
    with pytest.raises(ConfigError, match="layer 1, expert_hidden has 4 values, .*the model needs 8"):
        plan.check_fits(model({}, num_experts=8))


def test_a_plan_file_of_another_model_is_named(tmp_path):
    file = tmp_path / "plan.json"
    SparsityPlan.uniform(model({}), 0.5).save(file)
    message = rf"^{file}: sparsity plan: layer 1, expert_hidden has 4 values, .*the model needs 8"
    with pytest.raises(ConfigError, match=message):
        SparsityPlan.load(file).check_fits(model({}, num_experts=8), file=file)
    with pytest.raises(ConfigError, match=message):
        SparsityPlan.from_config(model({"plan": str(file)}, num_experts=8))


def test_a_plan_can_be_scaled_and_has_a_mean():
    plan = SparsityPlan.uniform(model({}), 0.5)
    assert plan.mean == pytest.approx(0.5)
    assert plan.scaled(0.5).mean == pytest.approx(0.25)


@pytest.mark.parametrize(("shape", "halfway"), [("constant", 1.0), ("linear", 0.5), ("cubic", 0.875), ("cosine", 0.5)])
def test_the_schedule_is_dense_in_the_warmup_and_reaches_the_target(shape, halfway):
    ramp = 0 if shape == "constant" else 10
    schedule = ScheduleConfig(shape=shape, warmup_steps=4, ramp_steps=ramp)
    assert [scheduled_scale(schedule, step) for step in (0, 3)] == [0.0, 0.0]
    assert scheduled_scale(schedule, 9) == pytest.approx(halfway)
    assert scheduled_scale(schedule, 14) == scheduled_scale(schedule, 99) == 1.0
    scales = [scheduled_scale(schedule, step) for step in range(20)]
    assert scales == sorted(scales)


def test_thresholds_go_through_json_and_are_dropped_when_s_is_scaled(tmp_path):
    plan = SparsityPlan.uniform(model({}), 0.5)
    calibrated = plan.with_thresholds({place: (0.1 + place[0],) * len(v) for place, v in plan.values.items()})
    assert calibrated != plan
    assert SparsityPlan.from_json(calibrated.to_json()) == calibrated
    calibrated.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == calibrated
    assert calibrated.scaled(1.0) == calibrated
    assert calibrated.scaled(0.5) == plan.scaled(0.5)


@pytest.mark.parametrize("thresholds", [(0.1,), (0.1, -1.0), (0.1, float("nan")), (0.1, float("inf"))])
def test_impossible_thresholds_are_refused(thresholds):
    with pytest.raises(
        ConfigError,
        match=r"has thresholds \[.*one for each of its 2 values of S.*calibrate the plan again with qsparse-moe calib",
    ):
        SparsityPlan({(0, "expert_input"): (0.5, 0.5)}, {(0, "expert_input"): thresholds})


def test_a_plan_file_is_the_whole_plan(tmp_path):
    plan = SparsityPlan.from_config(model({"default": 0.3, "overrides": [{"experts": 1, "sparsity": 0.9}]}))
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.from_config(model({"plan": str(tmp_path / "plan.json")})) == plan
    with pytest.raises(ConfigError, match="layer 1, expert_hidden has 4 values, .*the model needs 8"):
        SparsityPlan.from_config(model({"plan": str(tmp_path / "plan.json")}, num_experts=8))
    with pytest.raises(ConfigError, match=r"none.json cannot be read as a sparsity plan .*name a file that exists"):
        SparsityPlan.load(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"plan.json: sparsity plan: not readable"):
        SparsityPlan.load(tmp_path / "plan.json")


def test_every_group_selects_the_same_whole_number_of_features():
    settings = model({"selection": "block", "group_size": 8}).sparsity
    # 2.4 of 8 in each of three groups are 2; of all 24 features together 7.2 would be 7.
    assert site_num_selected(settings, 0.7, 24) == 6
    assert num_selected(0.7, 24) == 7


def test_groups_that_do_not_divide_a_sparse_site_are_refused_and_a_whole_site_has_all_its_features():
    config = model({"selection": "block", "group_size": 32}, expert_hidden_size=40)
    assert site_num_selected(config.sparsity, 0.0, 40) == 40
    plan = SparsityPlan.uniform(config, 0.0)
    plan.check_fits(config)
    sparse = SparsityPlan(plan.values | {(1, "expert_hidden"): (0.0, 0.5, 0.0, 0.0)})
    with pytest.raises(ConfigError, match=r"layer 1, expert_hidden has S above 0 and 40 features.*group_size \(32\)"):
        sparse.check_fits(config)


def test_thresholds_are_calibrated_or_normal_quantiles_and_none_where_s_is_0():
    threshold, statistical = (SparsityConfig(selection=name) for name in ("threshold", "statistical"))
    assert site_threshold(threshold, 0.5, 0.3) == 0.3
    assert site_threshold(statistical, 0.5, 0.3) == pytest.approx(0.0)
    assert site_threshold(statistical, 0.975, 0.3) == pytest.approx(1.96, abs=1e-3)
    assert site_threshold(threshold, 0.0, 0.3) == site_threshold(statistical, 0.0, 0.3) == -float("inf")


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5)])
def test_the_straight_through_share_goes_from_start_to_end_along_its_shape(shape, halfway):
    blend = {"start": 0.9, "end": 0.1, "shape": shape, "hold_steps": 4, "ramp_steps": 10}
    settings = SparsityConfig(gradient="blend", blend=blend)
    shares = [ste_share(settings, step) for step in range(30)]
    assert shares[:5] == [0.9] * 5
    assert shares[9] == pytest.approx(halfway)
    assert shares[14:] == [0.1] * 16
    assert shares == sorted(shares, reverse=True)
    assert shares[6] == pytest.approx(0.74 if shape == "linear" else 0.8236, abs=1e-4)


def test_the_plain_gradients_are_the_ends_of_the_blend():
    assert ste_share(SparsityConfig(gradient="ste"), 7) == 1.0
    assert ste_share(SparsityConfig(gradient="masked"), 7) == 0.0


def test_presets_set_s_and_formats_as_published():
    config = model({"preset": "a4.8"}, num_shared_experts=1)
    plan = SparsityPlan.from_config(config)
    assert plan == SparsityPlan.preset(config, "a4.8")
    assert {place for place, values in plan.values.items() if any(values)} == {
        (i, "attention_output") for i in range(3)
    }
    assert plan.values[1, "attention_output"] == (0.5,)
    formats = {site: site_format(config.sparsity, site) for site in SITES}
    assert {site for site, name in formats.items() if name == "int4"} == {
        "attention_input", "expert_input", "shared_input", "dense_input",
    }  # fmt: skip
    assert set(formats.values()) == {"int4", "int8"}
    paper = model({"preset": "paper"})
    assert SparsityPlan.from_config(paper) == SparsityPlan.preset(paper, "paper") == SparsityPlan.uniform(paper, 0.3)
    assert {site_format(paper.sparsity, site) for site in SITES} == {"none"}
    dense = model({"preset": "dense"})
    assert SparsityPlan.from_config(dense) == SparsityPlan.preset(dense, "dense") == SparsityPlan.uniform(dense, 0.0)
    with pytest.raises(ConfigError, match="'papre'.* preset; choose from dense, paper, a4.8"):
        SparsityPlan.preset(dense, "papre")


def test_default_sites_overrides_and_formats_come_before_the_preset():
    given = {"default": 0.0, "sites": {"attention_input": 0.6}, "overrides": [{"layers": 2, "sparsity": 0.9}]}
    plan = SparsityPlan.from_config(model({"preset": "paper"} | given))
    assert plan.values[0, "attention_input"] == (0.6,)
    assert plan.values[0, "attention_output"] == (0.0,)
    assert plan.values[2, "attention_output"] == (0.9,)
    quantization = {"activations": "none", "sites": {"expert_hidden": "int4"}}
    settings = model({"preset": "a4.8", "quantization": quantization}).sparsity
    assert {site: name for site in SITES if (name := site_format(settings, site)) != "none"} == {
        "expert_hidden": "int4"
    }


def test_the_mean_weighs_every_site_the_same_however_many_experts_it_has():
    config = ModelConfig.model_validate({"num_layers": 2, "moe": {"num_experts": 8}})
    plan = SparsityPlan(
        {
            place: (0.8 if "expert" in place[1] else 0.0,) * len(v)
            for place, v in SparsityPlan.uniform(config, 0).values.items()
        }
    )
    assert {len(values) for values in plan.values.values()} == {1, 8}
    assert plan.mean == pytest.approx(0.4)
