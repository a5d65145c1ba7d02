"""The ``config.json`` of model type ``qsparse_moe``: what it holds, and what is refused in one that was edited."""

from __future__ import annotations

import json

import pytest

from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.auto_model.settings import read_settings, section_settings
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.interop.auto_models import MODELS, build, config, threshold_plan


def settings(name="sparse"):
    model = build(name)
    return json.loads(json.dumps(section_settings(model.config, model.sparsity_plan)))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_plan_are_restored(name):
    model = build(name)
    assert read_settings(settings(name), "config.json") == (model.config, model.sparsity_plan)


def test_a_plan_is_written_only_if_the_section_does_not_describe_it():
    assert settings("per-expert")["sparsity_plan"] is None
    found = settings("threshold")
    assert found["sparsity_plan"]["values"][0]["threshold"] == [0.1]
    assert found["qsparse_moe"]["sparsity"]["selection"] == "threshold"


def test_the_path_of_a_plan_file_does_not_travel(tmp_path):
    plan = threshold_plan(build("sparse"))
    plan.save(tmp_path / "plan.json")
    model = config("sparse", sparsity={"default": None, "plan": str(tmp_path / "plan.json")})
    found = section_settings(model, plan)
    assert found["qsparse_moe"]["sparsity"]["plan"] is None
    restored, restored_plan = read_settings(found, "config.json")
    assert restored_plan == plan
    assert restored.sparsity.default is None


def changed(change):
    found = settings("threshold")
    change(found)
    return found


CASES = {
    "a contradiction": (
        lambda found: found.update(hidden_size=48),
        r"config.json: hidden_size \(48\) must be 44, which follows from the section qsparse_moe; change the section",
    ),
    "tied by one name only": (
        lambda found: found.update(tie_word_embeddings=True),
        r"tie_word_embeddings \(true\) must be false",
    ),
    "an unknown setting": (
        lambda found: found["qsparse_moe"].update(hiden_size=44),
        "the model section of a run: model.hiden_size is not a setting; did you mean model.hidden_size",
    ),
    "a wrong type": (lambda found: found["qsparse_moe"].update(num_layers="3"), r"model.num_layers \(\"3\"\)"),
    "a broken rule": (lambda found: found["qsparse_moe"].update(num_kv_heads=4), "model.num_kv_heads"),
    "no section": (lambda found: found.update(qsparse_moe=3), r"qsparse_moe \(3\) must be an object with the settings"),
    "a plan file": (
        lambda found: found["qsparse_moe"]["sparsity"].update(plan="plan.json"),
        r'qsparse_moe.sparsity.plan \("plan.json"\) must be null here.*put its content under sparsity_plan',
    ),
    "no threshold": (
        lambda found: found["sparsity_plan"]["values"][2].pop("threshold"),
        "sparsity_plan: sparsity plan: layer 0, dense_input has S above 0 and no threshold",
    ),
    "another model's plan": (
        lambda found: found["sparsity_plan"]["values"].pop(),
        "sparsity_plan: sparsity plan: layer 2, .* has 0 values, but the model needs",
    ),
    "no plan": (lambda found: found.update(sparsity_plan=[]), "sparsity_plan: sparsity plan: not readable"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_edited_file_is_refused_with_the_reason(case):
    change, message = CASES[case]
    with pytest.raises(ConfigError, match=message):
        read_settings(changed(change), "config.json")


def test_a_setting_that_is_no_part_of_the_model_is_not_read():
    model, plan = read_settings(settings() | {"transformers_version": "5.0.0"}, "config.json")
    assert plan == SparsityPlan.from_config(model)
