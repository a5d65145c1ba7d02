"""Grid files, their runs and their table."""

import json
from pathlib import Path

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.run import run_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.accounting.parameters import count_by_part
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.transformer import build_model
from qsparse_moe.runs.folder import run_folder

BASE = """
model:
  {hidden_size: 16, num_layers: 1, num_heads: 2, moe: {num_experts: 2, experts_per_token: 2, expert_hidden_size: 16}}
data: {sequence_length: 32, sources: [{max_bytes: 200000}]}
training: {steps: 2, global_batch_size: 2, micro_batch_size: 2, engine: torch, device: cpu, evaluation_rows: 4}
metrics: {interval: 1, tensorboard: false, layer_gradients: true}
"""
GRID = """
base: base.yaml
seeds: [0, 3]
settings: {training.learning_rate: 2.0e-3}
variants:
  dense:
  half: {model.sparsity.default: 0.5}
"""


@pytest.fixture
def write(tmp_path):
    def files(grid=GRID, base=BASE):
        (tmp_path / "base.yaml").write_text(base)
        path = tmp_path / "mini.yaml"
        path.write_text(grid)
        return path

    return files


def test_every_variant_and_seed_is_a_complete_config_with_a_stable_id(write, tmp_path):
    grid = load_grid(write(), ["training.steps=7"], output_dir=str(tmp_path / "out"))
    assert [run.id for run in grid.runs] == ["dense-seed0", "dense-seed3", "half-seed0", "half-seed3"]
    last = grid.runs[-1].config
    assert (last.model.sparsity.default, last.training.seed, last.training.steps) == (0.5, 3, 7)
    assert last.training.learning_rate == 2e-3
    assert last.training.resume
    assert grid.folder == tmp_path / "out" / "mini"


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


def test_what_a_grid_varies_has_a_column_of_the_hparams_page_in_every_run(write, tmp_path):
    grid = GRID + "axes: {model.init_std: [0.02, 0.1]}\n"
    assert {tuple(run.config.metrics.hyperparameters) for run in load_grid(write(grid)).runs} == {()}
    base = BASE.replace("tensorboard: false", "hyperparameters: [training.steps]")
    found = {tuple(run.config.metrics.hyperparameters) for run in load_grid(write(grid, base)).runs}
    assert found == {("training.steps", "model.init_std", "model.sparsity.default")}


AXES = """
base: base.yaml
seeds: [0]
axes:
  size:
    small: {model.hidden_size: 16, model.num_layers: 1}
    large: {model.hidden_size: 32, model.num_layers: 2}
  model.moe.num_experts: [2, 4]
  model.sparsity.rescale: [none, unit]
extra_seeds:
  - {seeds: [1], points: [small-E4-*]}
"""


def test_axes_are_crossed_linked_settings_change_together_and_a_part_has_more_seeds(write, tmp_path):
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


def test_ids_stay_when_entries_are_added(write, tmp_path):
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
def test_an_axis_that_says_nothing_or_a_thing_twice_is_refused_and_nothing_written(write, tmp_path, grid, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_grid(write(grid), output_dir=str(tmp_path / "out"))
    assert str(tmp_path / "mini.yaml") in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "mini.yaml"]


def test_two_points_of_one_name_are_refused(write):
    axes = "axes: {one: {b-c: {model.num_layers: 2}, c: {model.num_layers: 1}}}"
    grid = "base: base.yaml\nseeds: [0]\nvariants: {a: , a-b: {model.num_heads: 1}}\n" + axes
    with pytest.raises(ConfigError, match="two points of the grid are named a-b-c; rename a variant or a setting"):
        load_grid(write(grid))


@pytest.mark.slow
def test_runs_end_are_kept_and_a_broken_one_does_not_stop_the_others(write, tmp_path):
    broken = GRID.replace("half: {", "half: {data.cache_dir: /proc/none, ").replace("[0, 3]", "[0]")
    grid = load_grid(write(broken), output_dir=str(tmp_path / "out"))
    told = []
    outcomes, stopped_by = run_grid(grid, notify=told.append)
    assert stopped_by == 0
    assert [outcome.finished for outcome in outcomes] == [True, False]
    assert outcomes[0].bits_per_byte > 0
    assert (outcomes[0].steps, outcomes[0].tokens) == (2, 2 * 2 * 32)
    assert outcomes[0].curve == [(2 * 2 * 32, outcomes[0].loss, outcomes[0].bits_per_byte)]
    last = json.loads((grid.folder / "dense-seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert outcomes[0].layer_grad_norms == [last["train/grad_norm/layer_0"]]
    assert "exit code 2" in outcomes[1].error
    assert told == outcomes
    before = (grid.folder / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns
    again, _ = run_grid(load_grid(write(GRID.replace("[0, 3]", "[0]")), output_dir=str(tmp_path / "out")))
    assert [outcome.finished for outcome in again] == [True, True]
    assert (grid.folder / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns == before


def nameless(config):
    training = config.training.model_copy(update={"name": "", "seed": 0})
    return config.model_copy(update={"training": training})


GRIDS = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_shipped_grid_describes_complete_runs_with_at_least_three_seeds(path):
    grid = load_grid(path)
    assert len({run.seed for run in grid.runs}) >= 3
    assert len({nameless(run.config).model_dump_json() for run in grid.runs}) == len(grid.variants)
    assert not any(run.config.metrics.tensorboard and run.config.metrics.interval < 10 for run in grid.runs)


def test_the_page_about_ablations_holds_a_grid_and_the_numbers_of_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "ablation.md").read_text("utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(example.replace("../recipes", str(GRIDS[0].parents[1] / "recipes")))
    ids = [run.id for run in load_grid(tmp_path / "mine.yaml").runs]
    assert "masked-S0.6-large-seed1" in ids and len(ids) == 8 * 2 + 2 * 2
    for example, num_runs in zip(page.split("```yaml\n")[2:], (12, 9), strict=True):
        (tmp_path / "mine.yaml").write_text(
            example.split("```")[0].replace("../recipes", str(GRIDS[0].parents[1] / "recipes"))
        )
        assert len(load_grid(tmp_path / "mine.yaml").runs) == num_runs
    for path in GRIDS:
        assert f"| `{path.stem}` | {len(load_grid(path).runs)} |" in page


def shipped(name):
    return load_grid(next(path for path in GRIDS if path.stem == name))


def test_the_promised_grids_are_shipped():
    promised = {"sparsity", "experts", "joint", "sites", "estimator", "rescale", "router", "law"}
    assert promised <= {path.stem for path in GRIDS}
    assert len(shipped("sparsity").runs) == 12


@pytest.mark.parametrize(
    ("name", "part"),
    [("experts", lambda parts: parts["experts"].active), ("joint", lambda parts: parts["experts"].kept)],
)
def test_a_grid_at_equal_cost_has_equal_cost(name, part):
    runs = shipped(name).runs
    costs = {part(count_by_part(run.config.model)) for run in runs}
    assert len(costs) == 1
    assert len({(run.config.model.moe.num_experts, run.config.model.moe.experts_per_token) for run in runs}) >= 6


def test_the_laws_data_set_varies_everything_that_the_law_is_of():
    grid = shipped("law")
    assert (len(grid.runs), len(grid.variants)) == (208, 144)
    models = [run.config.model for run in grid.runs]
    assert len({model.hidden_size for model in models}) == 4
    assert len({model.moe.experts_per_token / model.moe.num_experts for model in models}) == 3
    assert len({model.sparsity.default for model in models}) == 4
    assert sum(run.seed > 0 for run in grid.runs) == 64
    # Every length decays to its own end; evaluations on the way would be of no length.
    assert {run.config.training.learning_rate_schedule for run in grid.runs} == {"cosine"}
    assert {run.config.training.steps for run in grid.runs} == {80, 160, 320}


def finished_run(run, rows):
    """The folder of ``run`` as training leaves it, with these lines of metrics."""
    folder = run_folder(run.config)
    (folder / "checkpoints" / f"step-{run.config.training.steps:08d}").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("steps", "mean"), [(4, [3.5, 35.0]), (5, [4.0, 40.0])])
def test_a_runs_gradient_norms_are_the_means_over_its_second_half(write, tmp_path, steps, mean):
    path = write(base=BASE.replace("num_layers: 1", "num_layers: 2"))
    grid = load_grid(path, [f"training.steps={steps}"], output_dir=str(tmp_path / "out"))
    run = grid.runs[0]
    names = ("train/grad_norm", "train/grad_norm/layer_0", "train/grad_norm/layer_1")
    finished_run(run, [{"step": s} | dict(zip(names, (100 * s, s, 10 * s), strict=True)) for s in range(1, steps + 1)])
    assert result_of(grid, run).layer_grad_norms == mean


def test_a_run_that_stopped_logging_gradient_norms_before_its_second_half_has_none(write, tmp_path):
    grid = load_grid(write(), output_dir=str(tmp_path / "out"))
    run = grid.runs[0]
    finished_run(run, [{"step": 1, "train/grad_norm/layer_0": 1.0}, {"step": 2, "train/grad_norm": 1.0}])
    assert result_of(grid, run).layer_grad_norms is None


def test_a_folder_made_with_other_settings_is_one_broken_run_among_finished_ones(write, tmp_path):
    path, out = write(GRID.replace("[0, 3]", "[0]")), str(tmp_path / "out")
    dense, half = load_grid(path, output_dir=out).runs
    finished_run(dense, [{"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}])
    finished_run(load_grid(path, ["training.beta1=0.5"], output_dir=out).runs[1], [])
    outcomes, _ = run_grid(load_grid(path, output_dir=out))
    assert [outcome.finished for outcome in outcomes] == [True, False]
    assert (outcomes[0].loss, outcomes[0].curve) == (1.0, [(128, 1.0, 1.4)])
    assert "was made with other settings" in outcomes[1].error and "training.beta1 was 0.5" in outcomes[1].error


def test_costs_of_relu_follow_the_zeros_that_the_run_measured(write, tmp_path):
    text = GRID.replace("0.5}", "0.5, model.sparsity.selection: relu, model.sparsity.gradient: masked}")
    grid = load_grid(write(text), output_dir=str(tmp_path / "out"))
    dense, relu = grid.runs[0], grid.runs[2]
    sites = ("attention_input", "attention_output", "expert_input", "expert_hidden")
    measured = {f"sparsity/{site}/zeros/layer_0": 0.0 for site in sites}
    validated = {"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}
    finished_run(relu, [validated | measured])
    assert result_of(grid, relu).kept_parameters == result_of(grid, dense).kept_parameters
    assert result_of(grid, relu).sparsity == 0.5


def test_a_row_of_results_says_where_s_lies_below_the_zeros_of_the_activation(write, tmp_path):
    path = write(GRID.replace("[0, 3]", "[0]"))
    dense, half = load_grid(path, output_dir=str(tmp_path / "out")).runs
    validated = {"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}
    level = {"sparsity/expert_hidden/zeros": 0.675, "sparsity/expert_hidden/zeros_chosen": 0.5}
    above = {"sparsity/expert_hidden/zeros": 0.51, "sparsity/expert_hidden/zeros_chosen": 0.5}
    finished_run(dense, [validated | {"step": 1} | level, validated | above])
    finished_run(half, [validated | {"step": 1} | above, validated | level])
    grid = load_grid(path, output_dir=str(tmp_path / "out"))
    assert result_of(grid, dense).natural_zeros == []
    assert result_of(grid, half).natural_zeros == [("expert_hidden", [], 0.675, 0.5)]


def test_a_row_of_results_holds_the_last_evaluation_the_median_speed_and_the_bytes_of_the_precision(write, tmp_path):
    path = write(GRID.replace("[0, 3]", "[0]"))
    logged = [
        {"step": 1, "tokens": 64, "validation/loss": 3.0, "validation/bits_per_byte": 4.0},
        {"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.5},
    ]
    rates = (90.0, 10.0, 20.0)
    logged += [{"step": 3 + i, "tokens": 192, "throughput/tokens_per_second": rate} for i, rate in enumerate(rates)]
    found = {}
    for precision in ("fp32", "bf16"):
        changed = [f"training.precision={precision}"]
        grid = load_grid(path, changed, output_dir=str(tmp_path / precision))
        finished_run(grid.runs[0], logged)
        found[precision] = result_of(grid, grid.runs[0])
    one = found["fp32"]
    assert one.curve == [(64, 3.0, 4.0), (128, 1.0, 1.5)]
    assert (one.steps, one.tokens, one.loss, one.bits_per_byte) == (2, 128, 1.0, 1.5)
    assert one.tokens_per_second == 20.0
    finished_run(grid.runs[1], [*logged, {"step": 6, "tokens": 256, "throughput/tokens_per_second": 30.0}])
    assert result_of(grid, grid.runs[1]).tokens_per_second == 25.0, "between the middle two of four"
    assert one.weight_bytes_1 == 2 * found["bf16"].weight_bytes_1 > 0
    assert one.weight_bytes_16 == 2 * found["bf16"].weight_bytes_16 > 0


def test_a_row_of_results_counts_the_parameters_of_the_built_model_and_those_that_a_token_uses(write, tmp_path):
    base = BASE.replace(
        "num_experts: 2, experts_per_token: 2", "num_experts: 5, experts_per_token: 2, num_shared_experts: 1"
    )
    grid = load_grid(write(base=base), output_dir=str(tmp_path / "out"))
    dense, half = (result_of(grid, grid.runs[index]) for index in (0, 2))
    sizes = {name: p.numel() for name, p in build_model(grid.runs[0].config.model).named_parameters()}
    tables = sizes.pop("embedding.weight") + sizes.pop("head.weight")
    assert tables == 2 * 264 * 16
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".moe.experts." in name)
    assert experts == 5 * 3 * 16 * 16
    assert (dense.total_parameters, dense.embedding_parameters) == (half.total_parameters, tables) == (total, tables)
    # 2 of 5 experts; of the tables the head and one row of the embedding.
    assert dense.active_parameters == half.active_parameters == total - experts * 3 // 5 + tables // 2 + 16
    by_part = {"attention": 4 * 16 * 16, "router": 5 * 16, "experts_active": 2 * 3 * 16 * 16, "shared": 3 * 16 * 16}
    assert dense.active_weights_by_part == half.active_weights_by_part == by_part
    # Every matrix but the router's and the head stands behind a site: half of its rows meet a zero.
    assert dense.kept_parameters == dense.active_parameters
    behind_sites = by_part["attention"] + by_part["experts_active"] + by_part["shared"]
    assert half.kept_parameters == half.active_parameters - behind_sites / 2


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


def test_a_list_of_variants_is_named_by_itself_or_by_what_it_sets(write, tmp_path):
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


def test_what_all_variants_share_is_not_in_their_names_and_an_axis_of_overrides_is_named_too(write):
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


def test_models_of_different_places_have_no_places_that_the_grid_varies(write):
    assert load_grid(write(AXES)).varied_sites == ()
    assert len(load_grid(write(GRID)).varied_sites) == 4


def test_runs_of_a_grid_name_their_variant_and_whole_lists_for_the_hparams_page(write):
    base = BASE.replace("tensorboard: false", "tensorboard: true")
    settings = "settings: {model.sparsity.overrides: [{experts: 0, sparsity: 0.0}]}"
    grid = f"base: base.yaml\nseeds: [0]\n{settings}\naxes: {{model.sparsity.overrides.0.sparsity: [0.0, 0.9]}}\n"
    runs = load_grid(write(grid, base)).runs
    assert [run.config.metrics.variant for run in runs] == ["sparsity-0.0", "sparsity-0.9"]
    assert {run.config.metrics.hyperparameters for run in runs} == {("model.sparsity.overrides",)}
