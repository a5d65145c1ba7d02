"""Settings as labels of figures, and as names of runs."""

from __future__ import annotations

import pytest

from qsparse_moe.config.labels import name_of, ranges_text, setting_label

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
        ("model.sparsity.plan", None, "plan null", None),
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
