"""The sizes to which a law is fitted, from the results that ablate writes per run."""

from __future__ import annotations

import json

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.ablation.law.read import read_runs
from tests.ablation.law_runs import write_rows

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
