"""Settings as labels of figures, and as names of runs."""

from __future__ import annotations

import pytest

from qsparse_moe.config.labels import name_of, override_label, place_label, ranges_text, setting_label

OVERRIDE = {"layers": 3, "experts": "0-1", "site": "expert_hidden", "sparsity": 0.9}


@pytest.mark.parametrize(
    ("path", "value", "label", "name"),
    [
        ("model.moe.num_experts", 8, "E=8", "E8"),
        ("model.sparsity.default", 0.5, "S=0.5", "S0.5"),
        ("model.sparsity.rescale", "unit", "rescale unit", "rescale-unit"),
        ("model.sparsity.sites.expert_hidden", 0.5, "expert_hidden S=0.5", "expert_hidden-S0.5"),
        (
            "model.sparsity.overrides",
            [OVERRIDE],
            "layer 3 experts 0-1 expert_hidden S=0.9",
            "layer-3-experts-0-1-expert_hidden-S0.9",
        ),
        (
            "model.sparsity.overrides",
            [{"layers": [0, 1, 2, 5], "sparsity": 0.25}, {"experts": 7, "sparsity": 0.0}],
            "layers 0-2,5 S=0.25; expert 7 S=0",
            "layers-0-2.5-S0.25_expert-7-S0",
        ),
        ("model.sparsity.overrides", [{"experts": 10, "sparsity": 0.5}], "expert 10 S=0.5", "expert-10-S0.5"),
        ("model.sparsity.overrides", [], "no overrides", "no-overrides"),
        ("model.sparsity.overrides.0.sparsity", 0.9, "S=0.9", "S0.9"),
        ("model.sparsity.overrides.0.layers", 3, "layer 3", "layer-3"),
        ("model.sparsity.overrides.1.experts", "2-3", "experts 2-3", "experts-2-3"),
        ("model.sparsity.overrides.0", OVERRIDE, "layer 3 experts 0-1 expert_hidden S=0.9", None),
        ("model.sparsity.overrides.0", {"sparsity": 0.5}, "S=0.5", "S0.5"),
        ("model.sparsity.plan", None, "plan null", None),
        ("model.hidden_size", 64, "D=64", "D64"),
        ("model.num_layers", 3, "L=3", "L3"),
        ("model.moe.experts_per_token", 2, "A=2", "A2"),
        ("model.moe.expert_hidden_size", 96, "F=96", "F96"),
        ("model.sparsity.quantization.sites.expert_hidden", "int4", "expert_hidden int4", "expert_hidden-int4"),
        ("training.learning_rate", 0.000123456789, "learning_rate 0.000123457", "learning_rate-0.000123457"),
        ("training.resume", True, "resume true", "resume-true"),
        ("training.steps", 1234567, "steps 1234567", "steps-1234567"),
        ("training.name", "_a/b=c. ", "name _a/b=c. ", "name-_a-bc"),
    ],
)
def test_a_setting_in_words_and_as_a_part_of_a_name(path, value, label, name):
    assert setting_label(path, value) == label
    assert name is None or name_of(label) == name


def test_long_values_are_cut():
    text = setting_label("data.sources", [{"kind": "text", "path": "x" * 200}])
    assert len(text) < 64 and text.endswith("…")
    assert setting_label("data.cache_dir", "x" * 48) == f"cache_dir {'x' * 48}"
    assert setting_label("data.cache_dir", "x" * 49) == f"cache_dir {'x' * 47}…"


def test_numbers_are_ranges_where_they_follow_each_other():
    assert ranges_text([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"
    assert ranges_text([3, 1, 2, 1, 3]) == "1-3"
    assert ranges_text([9, 4, 6, 5, 1, 3]) == "1,3-6,9"
    assert ranges_text([7, 9]) == "7,9"
    assert ranges_text([]) == ""


@pytest.mark.parametrize(
    ("place", "label"),
    [
        ((None, None, None), ""),
        ((0, "dense_hidden", None), "layer 0 dense_hidden"),
        (([4], "expert_input", (2,)), "layer 4 expert 2 expert_input"),
        (([4, 2], None, "12"), "layers 2,4 expert 12"),
        (("0-3", None, [3, 1, 2]), "layers 0-3 experts 1-3"),
    ],
)
def test_a_place_names_layers_then_experts_then_the_site(place, label):
    assert place_label(*place) == label


@pytest.mark.parametrize(
    ("override", "label"),
    [
        ({}, "everywhere"),
        ({"sparsity": None, "layers": None}, "everywhere"),
        ({"sparsity": 0}, "S=0"),
        ({"site": "expert_input"}, "expert_input"),
        ({"site": "expert_input", "sparsity": 0.125}, "expert_input S=0.125"),
    ],
)
def test_parts_of_an_override_that_are_not_given_are_left_out(override, label):
    assert override_label(override) == label


def test_a_name_has_no_punctuation_at_its_ends_and_one_dash_for_other_characters():
    assert name_of("..a/ü(b)__c, d; e-") == "a-b-__c.-d_e"
