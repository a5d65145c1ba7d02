"""Grid files, their runs and their table."""

import json
from pathlib import Path

import pytest

from qsparse_moe.ablation.grid import load_grid
from qsparse_moe.ablation.report import markdown, write_results
from qsparse_moe.ablation.run import Outcome, outcome_of, run_grid
from qsparse_moe.config.load import config_to_yaml
from qsparse_moe.errors import ConfigError
from qsparse_moe.training.run_folder import run_folder

BASE = """
model:
  {hidden_size: 16, num_layers: 1, num_heads: 2, moe: {num_experts: 2, experts_per_token: 1, expert_hidden_size: 16}}
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
        (GRID + "  half: {}\n", "the key half stands twice"),
        (GRID.replace("seeds: [0, 3]", "seeds: []"), r"seeds \(\[\]\).*at least 1 item.*a grid file holds base, seeds"),
        (GRID.replace("base:", "bases:"), r"bases.*Extra inputs"),
        (
            GRID.replace("model.sparsity.default", "model.sparsity.defalt"),
            "variant half: model.sparsity.defalt is not a",
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


def test_runs_end_are_kept_and_a_broken_one_does_not_stop_the_others(write, tmp_path):
    broken = GRID.replace("half: {", "half: {data.cache_dir: /proc/none, ").replace("[0, 3]", "[0]")
    grid = load_grid(write(broken), output_dir=str(tmp_path / "out"))
    told = []
    outcomes = run_grid(grid, tell=told.append)
    assert [outcome.finished for outcome in outcomes] == [True, False]
    assert outcomes[0].bits_per_byte > 0
    assert outcomes[0].tokens == 2 * 2 * 32
    last = json.loads((grid.folder / "dense-seed0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert outcomes[0].layer_grad_norms == [last["train/grad_norm/layer_0"]]
    assert "exit code 2" in outcomes[1].error
    assert told == outcomes
    before = (grid.folder / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns
    again = run_grid(load_grid(write(GRID.replace("[0, 3]", "[0]")), output_dir=str(tmp_path / "out")))
    assert [outcome.finished for outcome in again] == [True, True]
    assert (grid.folder / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns == before


GRIDS = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_shipped_grid_describes_complete_runs_with_at_least_three_seeds(path):
    grid = load_grid(path)
    assert len({run.seed for run in grid.runs}) >= 3
    assert len({run.config.model.model_dump_json() for run in grid.runs}) == len(grid.variants)


def outcome(variant, seed, bits, layers=None):
    return Outcome(f"{variant}-seed{seed}", variant, seed, bits is not None, None, bits, 1.0, 8, 100, 50, 10.0, layers)


def test_the_table_has_mean_spread_and_the_distance_seed_by_seed(write, tmp_path):
    grid = load_grid(write())
    outcomes = [outcome("dense", 0, 2.0), outcome("dense", 3, 3.0), outcome("half", 0, 2.5), outcome("half", 3, None)]
    rows = markdown(grid, outcomes).splitlines()
    assert rows[2] == "| dense | 2.0000 | 3.0000 | 2.5000 ± 0.7071 | +0.0000 ± 0.0000 | 50 | 10 |"
    assert rows[3] == "| half | 2.5000 | – | 2.5000 | +0.5000 | 50 | 10 |"
    write_results(grid, outcomes, tmp_path / "results")
    lines = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [o.id for o in outcomes]
    assert len(rows) == 4, "no run has gradient norms by layer, so there is no table of them"


def test_gradient_norms_by_layer_are_a_table_of_their_own(write, tmp_path):
    grid = load_grid(write())
    outcomes = [
        outcome("dense", 0, 2.0, [1.0, 2e-7, 0.5]),
        outcome("dense", 3, 3.0, [3.0, 4e-7, 0.5]),
        outcome("half", 0, 2.5, [0.75, 123.456]),
        outcome("half", 3, None),
    ]
    quality, said, *rows = markdown(grid, outcomes).split("\n\n")
    assert len(quality.splitlines()) == 4 and said.startswith("Gradient norm by layer")
    assert rows[0].splitlines() == [
        "| variant | layer 0 | layer 1 | layer 2 |",
        "| --- | --- | --- | --- |",
        "| dense | 2 ± 1.41 | 3e-07 ± 1.41e-07 | 0.5 ± 0 |",
        "| half | 0.75 | 123 | – |",
    ]
    write_results(grid, outcomes, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["layer_grad_norms"] for line in lines] == [o.layer_grad_norms for o in outcomes]
    assert said in (tmp_path / "report.md").read_text()


def finished_run(run, rows):
    """The folder of ``run`` as training leaves it, with these lines of metrics."""
    folder = run_folder(run.config)
    (folder / "checkpoints" / f"step-{run.config.training.steps:08d}").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("steps", "mean"), [(4, [3.5, 35.0]), (5, [4.0, 40.0])])
def test_a_runs_gradient_norms_are_the_means_over_its_second_half(write, tmp_path, steps, mean):
    path = write(base=BASE.replace("num_layers: 1", "num_layers: 2"))
    run = load_grid(path, [f"training.steps={steps}"], output_dir=str(tmp_path / "out")).runs[0]
    names = ("train/grad_norm", "train/grad_norm/layer_0", "train/grad_norm/layer_1")
    finished_run(run, [{"step": s} | dict(zip(names, (100 * s, s, 10 * s), strict=True)) for s in range(1, steps + 1)])
    assert outcome_of(run).layer_grad_norms == mean


def test_a_run_that_stopped_logging_gradient_norms_before_its_second_half_has_none(write, tmp_path):
    run = load_grid(write(), output_dir=str(tmp_path / "out")).runs[0]
    finished_run(run, [{"step": 1, "train/grad_norm/layer_0": 1.0}, {"step": 2, "train/grad_norm": 1.0}])
    assert outcome_of(run).layer_grad_norms is None
