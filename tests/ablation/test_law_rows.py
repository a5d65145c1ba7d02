"""The sizes to which a law is fitted, from the results that ablate writes per run."""

from __future__ import annotations

import json
import math

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.ablation.law.joint import KEPT
from qsparse_moe.ablation.law.read import read_runs
from qsparse_moe.errors import ConfigError
from tests.ablation.law_runs import observations_of, rows_of, write_rows

BASE = """
model:
  hidden_size: 16
  num_layers: 2
  num_heads: 2
  moe: {num_experts: 4, experts_per_token: 1, expert_hidden_size: 32}
  sparsity: {default: 0.5}
data: {sequence_length: 32, sources: [{max_bytes: 200000}]}
training: {steps: 2, global_batch_size: 2, micro_batch_size: 2, engine: torch, device: cpu, evaluation_rows: 4}
"""
CURVE = [[500, 5.0, 7.2], [1000, 4.0, 5.8]]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "grid.yaml").write_text("base: base.yaml\nseeds: [0, 1]\nvariants: {half: {}}\n")
    grid = load_grid(tmp_path / "grid.yaml", output_dir=str(tmp_path / "out"))
    rows = [json.loads(json.dumps(result_of(grid, run).as_dict())) for run in grid.runs]
    done = {"finished": True, "tokens": 1000, "loss": 4.0, "bits_per_byte": 5.8, "curve": CURVE}
    return write_rows(tmp_path / "results.jsonl", [row | done for row in rows])


def test_parameters_are_the_weight_matrices_without_embedding_head_and_norms(file):
    points = read_runs([file]).observations
    attention, router, expert = 2 * 4 * 16 * 16, 2 * 4 * 16, 2 * 3 * 16 * 32
    norms = 2 * 2 * 16 + 16
    assert points.active.tolist() == [attention + router + expert] * 4
    # The router sees dense tokens.
    assert points.needed.tolist() == [0.5 * (attention + expert) + router] * 4
    assert points.total[0] == pytest.approx(attention + router + 4 * expert + norms)
    assert points.expert_share[0] == 0.25 and points.granularity[0] == 2.0 and points.backbone[0] == 2 * 16**2


def test_a_run_gives_its_whole_curve_its_last_evaluation_or_its_late_evaluations(file):
    points = read_runs([file]).observations
    assert points.tokens.tolist() == [500, 1000] * 2 and points.loss.tolist() == [5.0, 4.0] * 2
    assert points.run.tolist() == [0, 0, 1, 1]
    assert points.configuration.tolist() == [0] * 4, "seeds are no configurations"
    assert read_runs([file], last_only=True).observations.loss.tolist() == [4.0, 4.0]
    assert read_runs([file.parent], min_tokens=501).observations.loss.tolist() == [4.0, 4.0]
    assert read_runs([file.parent], min_tokens=500).observations.loss.tolist() == [5.0, 4.0] * 2
    assert read_runs([file], unit="bits-per-byte").observations.loss.tolist() == [7.2, 5.8] * 2


def test_a_run_whose_tokens_use_every_expert_has_an_active_fraction_of_1(file):
    (row, *_) = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [row | {"experts_per_token": 4}])
    assert read_runs([file]).observations.expert_share.tolist() == [1.0, 1.0]


def records(tmp_path, *changes, name="runs.jsonl"):
    """A results file with one run per mapping, which changes it: of 64 x 4, 2 of 8 experts and a token of one byte."""
    constants = {"E": 1.0, "a": 0.9, "b": 0.6, "alpha": 0.3, "delta": 0.2, "beta": 0.1, "nu": 0.5}
    (row,) = rows_of(observations_of(KEPT, constants, widths=(64,), experts=((8, 2),), sparsities=(0.5,)))
    return write_rows(tmp_path / name, [row | {"id": f"run{i}"} | change for i, change in enumerate(changes)])


def refusal(*files):
    with pytest.raises(ConfigError) as caught:
        read_runs(files)
    return str(caught.value)


def test_runs_of_two_vocabularies_or_texts_are_refused_with_both_figures_and_both_runs(tmp_path):
    file = records(tmp_path, {}, {}, {"embedding_parameters": 64 * 515})
    assert refusal(file) == (
        f"{file}, run run2: embedding and head have 515 rows (embedding_parameters / hidden_size), but those of "
        f"{file}, run run0 have 514; a law needs runs with one vocabulary, so fit these files separately"
    )
    file = records(tmp_path, {}, {"loss": 1.5, "bits_per_byte": 1 / math.log(2)})
    assert refusal(file) == (
        f"{file}, run run1: a validation token has 1.500 bytes, but 1.000 in {file}, run run0; a law "
        "needs runs with one tokenizer and one validation text, so fit these files separately"
    )
    # Another number of validation sequences reads a little more or less of the same text: 2 % are allowed.
    near, far = ({"loss": ratio, "bits_per_byte": 1 / math.log(2)} for ratio in (1.019, 1.021))
    assert read_runs([records(tmp_path, {}, near)]).observations.num_runs == 2
    assert "a validation token has 1.021 bytes" in refusal(records(tmp_path, {}, far))


def test_a_run_in_two_files_is_refused_but_runs_of_two_grids_may_have_one_name(tmp_path):
    one, other = (records(tmp_path, {}, name=name) for name in ("one.jsonl", "other.jsonl"))
    assert refusal(one, other) == (f"{other}, run run0: the run also occurs in {one}, run run0; name each file once")
    runs = read_runs([one, records(tmp_path, {"grid": "wider"}, name="wider.jsonl")])
    assert runs.observations.num_runs == 2 and runs.files == (str(one), str(tmp_path / "wider.jsonl"))


def test_runs_that_did_not_finish_are_counted(tmp_path):
    unfinished = {"finished": False}
    assert read_runs([records(tmp_path, unfinished, {}, unfinished)]).left_out == 2
    file = records(tmp_path, unfinished, unfinished)
    assert refusal(file) == f"{file}: it has no finished run (2 unfinished); finish the grid first"


def test_active_weights_are_those_of_attention_router_experts_and_dense_layers_alone(tmp_path):
    parts = {"attention": 1, "router": 20, "shared": 300, "experts_active": 4000, "dense": 50_000, "head": 600_000}
    change = {"active_weights_by_part": parts, "active_parameters": 60_000, "kept_parameters": 30_000}
    points = read_runs([records(tmp_path, change)]).observations
    # Of 60,000 active, 5,679 are no weights behind sites; they are among the 30,000 as well.
    assert points.active[0] == 54_321 and points.needed[0] == 30_000 - 5_679
    nothing = change | {"kept_parameters": 5_679}
    assert "kept_parameters (5679) is less than what Q-Sparse does not change" in refusal(records(tmp_path, nothing))
    assert "active_parameters minus active_weights_by_part (5679); make" in refusal(records(tmp_path, nothing))


@pytest.mark.parametrize("evaluation", [[1000, 0.0, 2.0], [0, 2.0, 2.0], [1000, 2.0], [1000, 2.0, 2.0, 2.0], 1000])
def test_an_evaluation_is_three_numbers_above_0(tmp_path, evaluation):
    file = records(tmp_path, {"curve": [[1000, 2.0, 2.9], evaluation]})
    assert refusal(file).startswith(
        f"{file}, run run0: an evaluation is {evaluation}; it must be tokens, loss, and bits per byte, all above 0"
    )


@pytest.mark.parametrize("value", [0, -1, True, float("nan"), float("inf"), "7", None])
def test_a_size_is_a_finite_number_above_0(tmp_path, value):
    file = records(tmp_path, {"num_layers": value})
    assert refusal(file) == f"{file}, run run0: num_layers ({value}) must be a number above 0; make the file again"


def test_runs_of_one_configuration_differ_only_in_their_seed(tmp_path):
    changes = (
        {"settings": {"training.seed": 0, "model.init_std": 0.02}},
        {"settings": {"training.seed": 1, "model.init_std": 0.02}},
        {"settings": {"training.seed": 1, "model.init_std": 0.1}},
        # Two grids may vary a size by other settings, or by another base.
        {"settings": {"training.seed": 1, "model.init_std": 0.02}, "num_layers": 5},
        {"settings": {"model.init_std": 0.02, "training.seed": 7}},
    )
    runs = read_runs([records(tmp_path, *changes)], last_only=True)
    assert runs.observations.configuration.tolist() == [0, 0, 1, 2, 0]


def test_sizes_units_and_bounds_of_a_record(tmp_path):
    change = {"loss": 2.0, "bits_per_byte": 2 / math.log(2), "curve": []}
    change |= {"num_layers": 3, "total_parameters": 1e6, "expert_hidden_size": 32, "sparsity": 0, "tokens": 7}
    file = records(tmp_path, change)
    points = read_runs([file], unit="bits").observations
    # Without a curve the last evaluation is the only one.
    assert points.tokens.tolist() == [7.0] and points.loss.tolist() == pytest.approx([2 / math.log(2)])
    assert (points.total[0], points.backbone[0], points.granularity[0]) == (1e6, 3 * 64**2, 4 * 64 / 32)
    assert (points.experts[0], points.experts_per_token[0], points.sparsity[0]) == (8, 2, 0.0)
