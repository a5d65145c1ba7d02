"""``ablate --results``: the finished runs of an earlier report are reported, and not trained again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.results import results_text
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.cli.app import run as run_verb
from qsparse_moe.config.schema import TrainingConfig
from qsparse_moe.runs.folder import run_folder
from tests.ablation.grid_files import finished_run
from tests.ablation.search_runs import SEARCH, evaluations, fake_children


@pytest.fixture
def grid(write, tmp_path):
    return load_grid(write(SEARCH), output_dir=str(tmp_path / "out"))


@pytest.fixture
def trained(grid, monkeypatch):
    """The ids of the runs that ``grid`` trains, in order."""
    return fake_children(monkeypatch, grid)


@pytest.fixture
def earlier(write, grid, tmp_path):
    """A command that names the results of a grid whose last search lacks a run, and the folder of these results."""
    results = []
    for run in grid.runs:
        if not run.only_best and run.id != "b-steps-4-learning_rate-0.001-seed0":
            shutil.rmtree(run_folder(run.config), ignore_errors=True)
            finished_run(run, evaluations(grid, run))
            results.append(result_of(grid, run))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "results.jsonl").write_text(results_text(results))
    command = ["ablate", str(write(SEARCH)), "--output-dir", str(tmp_path / "none")]
    return [*command, "--results", str(tmp_path / "earlier")]


def test_the_runs_of_an_earlier_report_are_reported_without_their_folders(earlier, tmp_path, capsys):
    assert run_verb([*earlier, "--report-only", "--output", str(tmp_path / "again")]) == 0
    report = capsys.readouterr().out
    assert "| a below b | section 4 | holds | no runs yet | holds |" in report
    assert "| b | 0.004 (highest) | – |" in report
    # Runs that did not start are counted, and have no line and no row of dashes.
    lines = (tmp_path / "again" / "results.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "earlier" / "results.jsonl").read_text().splitlines() and len(lines) == 23
    page = (tmp_path / "again" / "report.html").read_text()
    assert "Train the 4 unfinished runs" in page and f"--results {tmp_path / 'earlier'}" in page
    assert "| b-steps-4-learning_rate-0.001 | – | 7.0" in report and not (tmp_path / "none").exists()


def test_the_runs_of_an_earlier_report_are_not_trained_again(earlier, monkeypatch, tmp_path, capsys):
    trained = fake_children(monkeypatch, load_grid(Path(earlier[1]), output_dir=str(tmp_path / "none")))
    assert run_verb([*earlier, "--list"]) == 0
    listed = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]
    assert sum(line.startswith("finished") for line in listed) == 23
    assert run_verb([*earlier, "--output", str(tmp_path / "again")]) == 0
    said = capsys.readouterr()
    # The search that lacked a run is completed, and every best value gets its further seed.
    assert trained == [
        "a-steps-2-learning_rate-0.002-seed5",
        "b-steps-2-learning_rate-0.004-seed5",
        "a-steps-4-learning_rate-0.002-seed5",
        "b-steps-4-learning_rate-0.001-seed0",
        "b-steps-4-learning_rate-0.004-seed5",
    ]
    assert "1/5  a-steps-2" in said.err and "5/5  b-steps-4-learning_rate-0.004-seed5" in said.err
    assert "| a below b | section 4 | holds | holds | holds |" in said.out
    assert "unfinished" not in (tmp_path / "again" / "report.html").read_text()
    assert len((tmp_path / "again" / "results.jsonl").read_text().splitlines()) == 28


def test_one_task_of_an_array_takes_its_run_from_an_earlier_report(earlier, trained, capsys):
    assert run_verb([*earlier, "--task", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["finished"] and trained == []


def test_a_run_of_an_earlier_report_may_be_that_of_an_older_grid(earlier, tmp_path):
    assert run_verb([*earlier, "metrics.interval=7", "training.keep_last=9", "--report-only"]) == 0
    file = tmp_path / "earlier" / "results.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    training = records[0]["config"]["training"]
    # At its default, which may change; and what decides nothing is not recorded.
    assert training["steps"] == 2 and training["weight_decay"] == TrainingConfig().weight_decay
    assert "name" not in training and "keep_last" not in training and "metrics" not in records[0]["config"]
    # A setting that came later is at its default in the earlier runs.
    for record in records:
        del record["config"]["training"]["weight_decay"]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run_verb([*earlier, "--report-only"]) == 0
    assert run_verb([*earlier, "--report-only", "training.weight_decay=0.25"]) == 2


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({"id": "other"}, [], "has no finished run of mini, but other; name the results.jsonl of an earlier report"),
        ({"finished": False}, [], "has no finished run of mini, but none at all; name"),
        (
            {},
            ["model.hidden_size=32", "training.evaluation_rows=3"],
            "a-steps-2-learning_rate-0.001-seed0 has other settings than the grid now gives it: model.hidden_size was "
            "16 and is 32; training.evaluation_rows was 4 and is 3. Restore them, or leave out --results to train",
        ),
        (
            {"config": None},
            [],
            "a-steps-2-learning_rate-0.001-seed0 does not record its settings, so that runs trained beside it may not "
            "be comparable; add --report-only, or leave out --results",
        ),
        (
            {"config": {"model": {"hidden_sizes": 3}}},
            [],
            "the settings of a-steps-2-learning_rate-0.001-seed0 cannot be read: model.hidden_sizes is not a setting",
        ),
    ],
)
def test_results_of_another_grid_are_refused_before_anything_is_written(
    earlier, tmp_path, capsys, trained, change, overrides, message
):
    file = tmp_path / "earlier" / "results.jsonl"
    records = [json.loads(line) | change for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run_verb([*earlier, *overrides]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert trained == [] and not (tmp_path / "none").exists()


def test_results_without_settings_can_still_be_reported(earlier, tmp_path, capsys):
    file = tmp_path / "earlier" / "results.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        del record["config"]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run_verb([*earlier, "--report-only", "--output", str(tmp_path / "again")]) == 0
    assert "| a below b | section 4 | holds |" in capsys.readouterr().out


def test_two_finished_lines_of_one_run_are_refused_and_those_of_another_grid_yield(earlier, tmp_path, capsys):
    file = tmp_path / "earlier" / "results.jsonl"
    text = file.read_text()
    first = json.loads(text.splitlines()[0])
    file.write_text(text + json.dumps(first | {"grid": "other", "bits_per_byte": 99.0}) + "\n")
    assert run_verb([*earlier, "--report-only", "--output", str(tmp_path / "again")]) == 0
    assert "99.0" not in capsys.readouterr().out
    file.write_text(text + json.dumps(first | {"bits_per_byte": 99.0}) + "\n")
    assert run_verb([*earlier, "--report-only"]) == 2
    message = f"has two finished lines of {first['id']}; remove the line that is not to count"
    assert message in " ".join(capsys.readouterr().err.split())
