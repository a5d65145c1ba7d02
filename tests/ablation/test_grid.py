"""Grid files: the runs that they describe, the names of the runs, and what is refused."""

from __future__ import annotations

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.errors import ConfigError
from tests.ablation.grid_files import AXES, BASE, GRID


def test_every_variant_and_seed_is_a_complete_config_with_a_stable_id(write, tmp_path):
    # The name of the folder is not to be read as YAML, in which it would end with a comment.
    grid = load_grid(write(), ["training.steps=7"], output_dir=str(tmp_path / "out: #1"))
    assert [run.id for run in grid.runs] == ["dense-seed0", "dense-seed3", "half-seed0", "half-seed3"]
    last = grid.runs[-1].config
    assert (last.model.sparsity.default, last.training.seed, last.training.steps) == (0.5, 3, 7)
    assert last.training.learning_rate == 2e-3
    assert last.training.resume
    assert grid.folder == tmp_path / "out: #1" / "mini"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (GRID + "  half: {}\n", "the key half occurs twice"),
        (GRID.replace("seeds: [0, 3]", "seeds: []"), r"seeds \(\[\]\).*at least 1 item.*a grid file holds base, seeds"),
        (GRID.replace("base:", "bases:"), r"bases.*Extra inputs"),
        (
            GRID.replace("model.sparsity.default", "model.sparsity.defalt"),
            "variants.half: model.sparsity.defalt is not a",
        ),
        (
            GRID.replace("{model.sparsity.default: 0.5}", "{training.seed: 1}"),
            r"variants.half sets training.seed \(1\)",
        ),
        (GRID.replace("variants:", "variant:"), "variants"),
    ],
)
def test_a_broken_grid_file_is_refused_before_anything_runs(write, tmp_path, grid, message):
    with pytest.raises(ConfigError, match=message):
        load_grid(write(grid))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "mini.yaml"]


def test_settings_that_a_grid_varies_have_a_column_on_the_hparams_page_in_every_run(write, tmp_path):
    grid = GRID + "axes: {model.init_std: [0.02, 0.1]}\n"
    assert {tuple(run.config.metrics.hyperparameters) for run in load_grid(write(grid)).runs} == {()}
    base = BASE.replace("tensorboard: false", "hyperparameters: [training.steps]")
    found = {tuple(run.config.metrics.hyperparameters) for run in load_grid(write(grid, base)).runs}
    assert found == {("training.steps", "model.init_std", "model.sparsity.default")}


def test_axes_are_crossed_linked_settings_change_together_and_some_points_have_extra_seeds(write, tmp_path):
    grid = load_grid(write(AXES), output_dir=str(tmp_path))
    assert len(grid.runs) == 8 + 2
    assert grid.variants[0] == "small-E2-rescale-none"
    by_id = {run.id: run for run in grid.runs}
    large = by_id["large-E4-rescale-unit-seed0"]
    assert (large.config.model.hidden_size, large.config.model.num_layers, large.config.model.moe.num_experts) == (
        32,
        2,
        4,
    )
    assert large.settings == {
        "model.hidden_size": 32,
        "model.num_layers": 2,
        "model.moe.num_experts": 4,
        "model.sparsity.rescale": "unit",
    }
    assert [run.id for run in grid.runs if run.seed == 1] == [
        "small-E4-rescale-none-seed1",
        "small-E4-rescale-unit-seed1",
    ]


def test_ids_stay_the_same_when_entries_are_added(write, tmp_path):
    before = {run.id: run.config for run in load_grid(write(AXES)).runs}
    more = (
        AXES.replace("[2, 4]", "[8, 2, 4]").replace("seeds: [0]", "seeds: [5, 0]").replace("[none,", "[preserve, none,")
    )
    after = {run.id: run.config for run in load_grid(write(more)).runs}
    assert len(after) > len(before) and before == {name: after[name] for name in before}


def test_variants_are_crossed_with_axes(write):
    grid = load_grid(write(GRID + "axes: {model.moe.num_experts: [2, 4]}"))
    assert grid.variants == ("dense-E2", "dense-E4", "half-E2", "half-E4")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            AXES.replace("model.moe.num_experts:", "model.moe.num_expert:"),
            "axes.model.moe.num_expert: model.moe.num_expert is not a setting; did you mean model.moe.num_experts",
        ),
        (AXES.replace("model.num_layers: 2", "model.layers: 2"), r"axes.size.large: model.layers is not a setting"),
        (AXES.replace("[2, 4]", "[]"), "axes.model.moe.num_experts is empty; .*values, or remove the axis"),
        (AXES.replace("[2, 4]", "[2, 4, 2]"), "axes.model.moe.num_experts has the value 2 twice; keep it once"),
        (
            AXES.replace("[none, unit]", "[[1], unit]"),
            r"has the value \[1\], which cannot be part of the name of a run",
        ),
        (AXES.replace("seeds: [0]", "seeds: [0, 0]"), r"seeds \(\[0, 0\]\) contains a seed twice"),
        (
            AXES.replace("model.num_layers: 1}", "model.moe.num_experts: 2}"),
            "axes.size and axes.model.moe.num_experts both set",
        ),
        (
            AXES.replace("[small-E4-*]", "[smal-E4-*]"),
            r'extra_seeds names "smal-E4-\*", which matches no point of the grid',
        ),
        (
            AXES.replace(" size:", " size:\n    huge: {model.hidden_size: 16, model.num_layers: 1}"),
            "have the same settings; remove",
        ),
        (
            GRID.replace("half: {model.sparsity.default: 0.5}", "half: {}"),
            "dense-seed0 and half-seed0 have the same settings; remove",
        ),
    ],
)
def test_an_axis_that_is_empty_or_repeats_a_value_is_refused_and_nothing_is_written(write, tmp_path, grid, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_grid(write(grid), output_dir=str(tmp_path / "out"))
    assert str(tmp_path / "mini.yaml") in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "mini.yaml"]


def test_two_points_with_the_same_name_are_refused(write):
    axes = "axes: {one: {b-c: {model.num_layers: 2}, c: {model.num_layers: 1}}}"
    grid = "base: base.yaml\nseeds: [0]\nvariants: {a: , a-b: {model.num_heads: 1}}\n" + axes
    with pytest.raises(ConfigError, match="two points of the grid are named a-b-c; rename a variant or a setting"):
        load_grid(write(grid))


ONES = """
base: base.yaml
seeds: [0]
settings: {model.moe.num_experts: 4}
variants:
  - name: dense
  - {model.sparsity.overrides: [{layers: 0, experts: [0, 1], site: expert_hidden, sparsity: 0.9}]}
  - {model.sparsity.overrides: [{layers: 0, experts: 2, sparsity: 0.5}]}
  - {name: last, model.sparsity.overrides: [{layers: 0, experts: 3, sparsity: 0.5}]}
"""


def test_variants_in_a_list_are_named_explicitly_or_by_the_settings_that_they_change(write, tmp_path):
    grid = load_grid(write(ONES), output_dir=str(tmp_path / "out"))
    assert grid.variants == ("dense", "layer-0-experts-0-1-expert_hidden-S0.9", "layer-0-expert-2-S0.5", "last")
    labels = [run.choices[0].label for run in grid.runs]
    assert labels == ["dense", "layer 0 experts 0-1 expert_hidden S=0.9", "layer 0 expert 2 S=0.5", "last"]
    assert {run.choices[0].paths for run in grid.runs} == {("model.sparsity.overrides",)}
    assert grid.varied_sites == ((0, "expert_input"), (0, "expert_hidden"))
    found = [result_of(grid, run).varied_sparsity for run in grid.runs]
    assert found[0] == [(0, "expert_input", None, 0.0), (0, "expert_hidden", None, 0.0)]
    assert found[1] == [
        (0, "expert_input", None, 0.0),
        (0, "expert_hidden", [0, 1], 0.9),
        (0, "expert_hidden", [2, 3], 0.0),
    ]
    assert (0, "expert_input", [2], 0.5) in found[2] and (0, "expert_hidden", [3], 0.5) in found[3]


def test_names_leave_out_what_all_variants_share_and_an_axis_of_overrides_is_named_too(write):
    shared = "{layers: 0, site: attention_input, sparsity: 0.5}"
    variants = "".join(
        f"  - {{training.beta1: 0.8, model.sparsity.overrides: [{shared}, {{experts: {e}, sparsity: 0.9}}]}}\n"
        for e in (0, 1)
    )
    grid = "base: base.yaml\nseeds: [0]\nvariants:\n" + variants
    assert load_grid(write(grid)).variants == ("expert-0-S0.9", "expert-1-S0.9")
    axis = "axes: {model.sparsity.overrides: [[], [{experts: 0, sparsity: 0.9}]]}\n"
    loaded = load_grid(write("base: base.yaml\nseeds: [0]\n" + axis))
    assert loaded.variants == ("no-overrides", "expert-0-S0.9")
    assert [run.choices[0].label for run in loaded.runs] == ["no overrides", "expert 0 S=0.9"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            "[{name: a}, {name: a, model.sparsity.default: 0.5}]",
            "variants .*two variants are named a; rename one of them",
        ),
        (
            "[dense, {model.sparsity.default: 0.5}]",
            "each entry must be a mapping of settings by dotted path",
        ),
        ("[{name: a b}]", "should match pattern"),
        ("[{name: a, model.sparsity.defalt: 0.5}]", "variants.a: model.sparsity.defalt is not a setting"),
    ],
)
def test_a_list_of_variants_that_cannot_be_named_is_refused(write, entries, message):
    with pytest.raises(ConfigError, match=message):
        load_grid(write(f"base: base.yaml\nseeds: [0]\nvariants: {entries}\n"))


def test_models_with_different_sites_have_no_sites_that_the_grid_varies(write):
    assert load_grid(write(AXES)).varied_sites == ()
    assert len(load_grid(write(GRID)).varied_sites) == 4


def test_runs_of_a_grid_name_their_variant_and_whole_lists_for_the_hparams_page(write):
    base = BASE.replace("tensorboard: false", "tensorboard: true")
    settings = "settings: {model.sparsity.overrides: [{experts: 0, sparsity: 0.0}]}"
    grid = f"base: base.yaml\nseeds: [0]\n{settings}\naxes: {{model.sparsity.overrides.0.sparsity: [0.0, 0.9]}}\n"
    runs = load_grid(write(grid, base)).runs
    assert [run.config.metrics.variant for run in runs] == ["sparsity-0.0", "sparsity-0.9"]
    assert {run.config.metrics.hyperparameters for run in runs} == {("model.sparsity.overrides",)}


@pytest.mark.parametrize(
    "override", ["training.seed=5", "training.name=mine", "training.output_dir=elsewhere", "training.resume=false"]
)
def test_a_setting_that_the_grid_sets_for_every_run_is_refused_on_the_command_line(write, override):
    name, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"{name} \({value}\) is set by the grid for every run of .*; remove it"):
        load_grid(write(), ["training.steps=7", override])
