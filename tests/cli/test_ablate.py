"""``qsparse-moe ablate``: what it lists, what it refuses, and how it shows its runs."""

import json
import shlex
from types import SimpleNamespace

import pytest

from qsparse_moe.cli.app import run
from qsparse_moe.cli.grid_progress import GridProgress
from tests.support.pages import read_page

GRID = """
base: base.yaml
seeds: [0, 1]
axes: {model.sparsity.default: [0, 0.5]}
"""


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "base.yaml").write_text("training: {engine: torch, device: cpu}\n")
    (tmp_path / "mini.yaml").write_text(GRID)
    return [str(tmp_path / "mini.yaml"), "--output-dir", str(tmp_path / "out")]


def test_list_prints_index_state_and_id(grid, capsys, tmp_path):
    assert run(["ablate", *grid, "--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["1", "to", "do", "S0-seed1"] and len(lines) == 4
    assert run(["ablate", *grid, "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["runs"][2] == {"index": 2, "id": "S0.5-seed0", "state": "to do"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "4"], "--task (4) must be the index of a run of mini, 0 to 3; --list"),
        (["--task", "1", "--list"], "--task, --list, and --report-only exclude each other"),
        (["--devices", "0", "--jobs", "2"], "--devices (0) must name 2 devices for 2 runs at a time (--jobs)"),
    ],
)
def test_impossible_options_are_refused_and_nothing_is_written(grid, capsys, tmp_path, options, message):
    assert run(["ablate", *grid, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_point_whose_router_the_loss_does_not_train_is_refused_by_name_before_any_run(grid, capsys, tmp_path):
    axes = "axes: {model.moe.experts_per_token: [2, 1]}"
    (tmp_path / "mini.yaml").write_text(GRID.replace("axes: {model.sparsity.default: [0, 0.5]}", axes))
    assert run(["ablate", *grid]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "error: variant A1: model.moe.router (softmax_topk_renormalized) gives a token's experts weights that sum to 1"
        in said
    )
    assert "choose model.moe.router=softmax_topk, or use at least 2 experts per token" in said
    assert not (tmp_path / "out").exists()


def test_report_only_starts_nothing(grid, capsys, tmp_path):
    assert run(["ablate", *grid, "--report-only"]) == 0
    assert "4 of 4 runs did not finish:" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out" / "mini").iterdir()) == [
        *("report.html", "report.md", "results.jsonl")
    ]
    (command,) = read_page((tmp_path / "out" / "mini" / "report.html").read_text()).commands
    assert shlex.split(command) == ["qsparse-moe", "ablate", *grid]


def outcome(name, bits, error=None):
    return SimpleNamespace(id=name, bits_per_byte=bits, error=error)


def test_without_a_terminal_every_run_has_a_line_with_the_best_so_far(capsys):
    with GridProgress(4) as tell:
        for ended in (outcome("a", None, "exit code 1"), outcome("b", 2.0), outcome("c", 2.5), outcome("d", 2.0)):
            tell(ended)
    assert capsys.readouterr().err.splitlines() == [
        "1/4  a  exit code 1",
        "2/4  b  2.0000 bits per byte  best b 2.0000 bits per byte",
        "3/4  c  2.5000 bits per byte  best b 2.0000 bits per byte",
        "4/4  d  2.0000 bits per byte  best b 2.0000 bits per byte",
    ]


def test_on_a_terminal_there_is_one_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with GridProgress(2) as tell:
        tell(outcome("a", 2.0))
        tell(outcome("b", 1.0))
    shown = capsys.readouterr().err
    assert "2/2" in shown and "best b 1.0000 bits per byte" in shown and "a  2.0000 bits per byte" in shown
