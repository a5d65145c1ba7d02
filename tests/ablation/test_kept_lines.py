"""No line of a measured run is lost when a report is written where there was one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qsparse_moe.ablation.grid.kept_lines import lines_to_write, names_of
from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.report import write_results
from qsparse_moe.ablation.grid.results import read_results, results_text
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.cli.app import run as run_verb
from tests.ablation.grid_files import finished_run
from tests.ablation.search_runs import SEARCH, evaluations
from tests.ablation.test_results import outcome, two_variants
from tests.support.pages import read_page

FURTHER = "a-steps-2-learning_rate-0.002-seed5"


@pytest.fixture
def earlier(write, tmp_path):
    """The folder of an earlier report of a search: its 24 runs, and one further seed of a best value."""
    grid = load_grid(write(SEARCH), output_dir=str(tmp_path / "out"))
    wanted = [run for run in grid.runs if not run.only_best or run.id == FURTHER]
    for run in sorted(wanted, key=lambda run: run.place["training.steps"], reverse=True):
        if run.id == FURTHER or run.place["training.steps"] == 4:
            finished_run(run, evaluations(grid, run))
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "results.jsonl").write_text(results_text([result_of(grid, run) for run in wanted]))
    return folder


def lines_of(folder):
    return (folder / "results.jsonl").read_text().splitlines()


def report_again(write, text, earlier, tmp_path, output):
    arguments = ["ablate", str(write(text)), "--output-dir", str(tmp_path / "none"), "--report-only"]
    return run_verb([*arguments, "--results", str(earlier), "--output", str(output)])


def test_runs_that_left_the_grid_stay_in_a_file_that_is_written_again_and_are_named(
    write, earlier, tmp_path, capsys, caplog
):
    before = lines_of(earlier)
    left = [name for line in before if "0.004" in (name := json.loads(line)["id"])]
    assert (len(before), len(left)) == (25, 8)
    fewer = SEARCH + 'exclude: ["*-learning_rate-0.004"]\n'
    assert report_again(write, fewer, earlier, tmp_path, earlier) == 0
    assert sorted(lines_of(earlier)) == sorted(before)
    assert [json.loads(line)["id"] for line in lines_of(earlier)[-8:]] == left
    named = f"8 runs ({', '.join(left[:3])}, ...)"
    assert f"--results ({earlier}) has {named} that mini does not have; its report leaves them out" in caplog.text
    assert f"{earlier / 'results.jsonl'} keeps the lines of {named} that this report does not have" in caplog.text
    said = f"The last lines of results.jsonl are those of {named} that were measured before and are not in this report"
    assert said in (earlier / "report.md").read_text()
    page = read_page((earlier / "report.html").read_text())
    assert "Runs outside of this report" in page.headings and any(text.startswith(said) for text in page.paragraphs)
    # Once more: nothing is added or lost.
    after = lines_of(earlier)
    assert report_again(write, fewer, earlier, tmp_path, earlier) == 0 and lines_of(earlier) == after
    # Elsewhere, the report has the runs of the grid, and says what it leaves out.
    caplog.clear()
    assert report_again(write, fewer, earlier, tmp_path, tmp_path / "other") == 0
    assert len(lines_of(tmp_path / "other")) == 17 and named in caplog.text and "keeps the lines" not in caplog.text


@pytest.mark.parametrize("output", ["earlier", "other"])
def test_runs_that_a_search_does_not_need_now_stay_as_well(write, earlier, tmp_path, caplog, output):
    before = lines_of(earlier)
    more = SEARCH.replace("[0.001, 0.002, 0.004]", "[0.001, 0.002, 0.004, 0.008]")
    assert report_again(write, more, earlier, tmp_path, tmp_path / output) == 0
    found = lines_of(tmp_path / output)
    # The search has a value without runs, so that its best one is unknown.
    assert sorted(found) == sorted(before) and json.loads(found[-1])["id"] == FURTHER
    assert f"keeps the lines of 1 run ({FURTHER})" in caplog.text


def test_a_run_that_failed_or_did_not_start_does_not_replace_its_measured_line(tmp_path, caplog):
    grid, folder = two_variants(tmp_path), tmp_path / "results"
    measured = [outcome("dense", 0, 2.0), outcome("dense", 3, 3.0)]
    write_results(grid, [*measured, replace(outcome("half", 0, None), error="lost")], folder)
    stopped = [replace(outcome(variant, 0, None), error="not started, SIGINT") for variant in ("dense", "half")]
    write_results(grid, [*stopped, outcome("half", 3, None)], folder)
    records = read_results([folder])
    assert [(one["id"], one["finished"], one["bits_per_byte"]) for one in records] == [
        ("half-seed0", False, None),
        ("dense-seed0", True, 2.0),
        ("dense-seed3", True, 3.0),
    ]
    assert records[0]["error"] == "not started, SIGINT" and "2 runs (dense-seed0, dense-seed3)" in caplog.text
    # A new measurement replaces the line.
    write_results(grid, [outcome("dense", 0, 1.5)], folder)
    assert [one["bits_per_byte"] for one in read_results([folder])] == [1.5, None, 3.0]


def test_lines_of_another_grid_stay_although_their_runs_have_the_same_names(tmp_path):
    (tmp_path / "results.jsonl").write_text(results_text([replace(outcome("dense", 0, 2.0), grid="other")]))
    found = lines_to_write([outcome("dense", 0, 3.0)], (), tmp_path / "results.jsonl")
    assert [json.loads(line)["bits_per_byte"] for line in found.text.splitlines()] == [3.0, 2.0]
    assert found.kept == ("dense-seed0",)


def test_a_file_with_lines_that_cannot_be_read_is_renamed_and_the_others_are_kept(tmp_path, caplog):
    grid, folder = two_variants(tmp_path), tmp_path / "results"
    write_results(grid, [outcome("half", 0, 2.0)], folder)
    file = folder / "results.jsonl"
    for number, broken in enumerate(['{"id": "dense-seed3", "los', '{"version": 1, "id": "dense-seed0"}'], 1):
        text = file.read_text() + broken + "\n"
        file.write_text(text)
        write_results(grid, [outcome("half", 3, 2.5)], folder)
        assert (folder / f"results.jsonl.{number}").read_text() == text
        assert f"{file} has lines that cannot be read, and is now results.jsonl.{number}" in caplog.text
        assert [one["id"] for one in read_results([folder])] == ["half-seed3", "half-seed0"]
    write_results(grid, [outcome("half", 3, 2.5)], folder)
    assert not (folder / "results.jsonl.3").exists()


def test_a_message_names_a_few_of_many_runs():
    assert names_of(["a"]) == "1 run (a)" and names_of(["a", "b", "c"]) == "3 runs (a, b, c)"
    assert names_of(["a", "b", "c", "d"]) == "4 runs (a, b, c, ...)"
