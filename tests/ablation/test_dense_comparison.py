"""The comparison of every run of a grid with itself at S = 0."""

from __future__ import annotations

import json
import logging

import pytest

from qsparse_moe.ablation.grid.dense_comparison import FIGURES, comparison_command, dense_figures
from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.report import markdown
from qsparse_moe.ablation.grid.run import run_grid
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.folder import run_folder
from tests.ablation.grid_files import GRID, finished_run

COMPARED = GRID + "compare_dense: 3\n"
FOUND = {"choices_changed": 0.25, "first_choice_changed": 0.5, "kl_divergence": 0.125, "top1_agreement": 0.75}
VALIDATED = [{"step": 2, "tokens": 128, "validation/loss": 1.0, "validation/bits_per_byte": 1.4}]


def stored(run, *, rows=3, step=2, **figures):
    """The file that the comparison of a finished run writes."""
    folder = run_folder(run.config) / "evaluation" / f"rows-{rows}"
    folder.mkdir(parents=True)
    content = {"step": step, "loss": 1.0, **FOUND, **figures}
    (folder / "comparison-run-against-dense.json").write_text(json.dumps(content))


@pytest.fixture
def grid(write, tmp_path):
    grid = load_grid(write(COMPARED), output_dir=str(tmp_path / "out"))
    for run in grid.runs:
        finished_run(run, VALIDATED)
    return grid


def test_figures_are_those_of_the_newest_checkpoint_and_the_asked_number_of_sequences(grid):
    first, second, third, fourth = grid.runs
    stored(first)
    stored(second, step=1)
    stored(third, rows=4)
    assert dense_figures(grid, first) == FOUND
    assert [dense_figures(grid, run) for run in (second, third, fourth)] == [None, None, None]
    folder = run_folder(fourth.config) / "evaluation" / "rows-3"
    folder.mkdir(parents=True)
    (folder / "comparison-run-against-dense.json").write_text('{"step": 2, "choi')
    assert dense_figures(grid, fourth) is None
    assert result_of(grid, first).against_dense == FOUND


def test_the_command_compares_without_generating_text(grid):
    command = comparison_command(grid, grid.runs[0])
    folder = run_folder(grid.runs[0].config)
    assert command[1:5] == ["-m", "qsparse_moe", "evaluate", str(folder)]
    output = str(folder / "evaluation" / "rows-3")
    assert command[5:] == ["--compare", "dense", "--rows", "3", "--prompts", "0", "--output", output]


def test_every_finished_run_is_compared_once_and_a_failure_is_reported(grid, monkeypatch, caplog):
    started = []

    def run(self, command, log, environment):
        started.append((command[4], log.name))
        return 0 if len(started) > 1 else 2

    monkeypatch.setattr("qsparse_moe.ablation.grid.run.Children.run", run)
    stored(grid.runs[3])
    with caplog.at_level(logging.WARNING, logger="qsparse_moe"):
        results, _ = run_grid(grid)
    assert [name for _, name in started] == [f"{run.id}.comparison.log" for run in grid.runs[:3]]
    assert f"{grid.runs[0].id}: the comparison with S = 0 failed (exit code 2)" in caplog.text
    assert [one.against_dense for one in results] == [None, None, None, FOUND] and all(one.finished for one in results)


def test_relu_and_grids_without_the_setting_are_not_compared(write, tmp_path, monkeypatch):
    monkeypatch.setattr("qsparse_moe.ablation.grid.run.Children.run", None)
    relu = COMPARED.replace("0.5}", "0.5, model.sparsity.selection: relu, model.sparsity.gradient: masked}")
    compared = load_grid(write(relu), output_dir=str(tmp_path / "relu"))
    plain = load_grid(write(), output_dir=str(tmp_path / "plain"))
    for one in (compared, plain):
        for run in one.runs:
            finished_run(run, VALIDATED)
            stored(run)
        run_grid(one)
    # By variant and seed: dense twice, then the one with ReLU.
    assert [result_of(compared, run).against_dense for run in compared.runs] == [FOUND, FOUND, None, None]
    assert [result_of(plain, run).against_dense for run in plain.runs] == [None] * 4
    assert "Against the same model" not in markdown(plain, [result_of(plain, run) for run in plain.runs])


def test_the_report_has_the_mean_and_the_deviation_over_the_seeds(grid):
    dense, other, half, _ = grid.runs
    stored(dense)
    stored(other, choices_changed=0.75)
    stored(half, choices_changed=None, first_choice_changed=None)
    report = markdown(grid, [result_of(grid, run) for run in grid.runs])
    assert "Against the same model at S = 0, on 3 validation sequences" in report
    table = report[report.index("| variant | choices changed") :].splitlines()
    assert table[2:4] == [
        "| dense | 0.5000 ± 0.3536 | 0.5000 ± 0.0000 | 0.1250 ± 0.0000 | 0.7500 ± 0.0000 |",
        "| half | – | – | 0.1250 | 0.7500 |",
    ]


def test_a_number_of_sequences_that_is_none_is_refused(write):
    with pytest.raises(ConfigError, match=r"compare_dense.*\b0\b"):
        load_grid(write(GRID + "compare_dense: 0\n"))


@pytest.mark.slow
def test_a_grid_trains_and_compares(write, tmp_path):
    grid = load_grid(write(COMPARED.replace("[0, 3]", "[0]")), output_dir=str(tmp_path / "out"))
    dense, half = run_grid(grid).results
    # The baseline has S = 0 itself, so it is compared with itself.
    assert dense.against_dense == dict(zip(FIGURES, (0.0, 0.0, 0.0, 1.0), strict=True))
    # Two of two experts: the set of choices cannot change, but the first one can.
    assert half.against_dense["choices_changed"] == 0.0 and 0 < half.against_dense["first_choice_changed"] < 1
    assert half.against_dense["kl_divergence"] > 0
    log = (grid.folder / f"{grid.runs[1].id}.comparison.log").read_text()
    assert "mean S 0.5000, against dense with mean S 0.0000, on 96 tokens of 3 sequences" in log
