"""The checks of the quickstart before training, and its summary at the end; .ci/run runs the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import qsparse_moe
from qsparse_moe.config.load import config_to_yaml, load_config

REPOSITORY = Path(qsparse_moe.__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "launch"))

import run_state  # noqa: E402
import summary  # noqa: E402

TINY = str(REPOSITORY / "configs" / "tiny.yaml")


def settings(tmp_path, *overrides):
    return [TINY, f"training.output_dir={tmp_path}", "training.steps=300", "training.resume=true", *overrides]


def make_run(tmp_path, *, checkpoints, overrides=()):
    path, *given = settings(tmp_path, *overrides)
    folder = tmp_path / "tiny"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(load_config(path, given)))
    for name in checkpoints:
        (folder / "checkpoints" / name).mkdir()
    return folder


def state(capsys, arguments):
    code = run_state.main(arguments)
    return code, *capsys.readouterr()


def test_run_that_was_never_begun_is_unfinished(tmp_path, capsys):
    assert state(capsys, settings(tmp_path)) == (0, f"unfinished {tmp_path / 'tiny'}\n", "")


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [
        ([], "unfinished"),
        (["step-00000299"], "unfinished"),
        ([".saving-step-00000300", "step-00000100"], "unfinished"),
        (["step-00000300"], "finished"),
        (["step-00000200", "step-00000400"], "finished"),
    ],
)
def test_run_is_finished_with_a_checkpoint_of_its_last_step_or_a_later_one(tmp_path, capsys, checkpoints, expected):
    folder = make_run(tmp_path, checkpoints=checkpoints)
    assert state(capsys, settings(tmp_path)) == (0, f"{expected} {folder}\n", "")


def test_more_steps_make_a_finished_run_unfinished(tmp_path, capsys):
    folder = make_run(tmp_path, checkpoints=["step-00000300"])
    assert state(capsys, settings(tmp_path, "training.steps=301"))[1] == f"unfinished {folder}\n"


def test_other_run_under_the_same_name_is_reported_with_the_remedy(tmp_path, capsys):
    make_run(tmp_path, checkpoints=["step-00000300"])
    code, output, message = state(capsys, settings(tmp_path, "model.num_layers=3"))
    assert (code, output) == (2, "")
    assert "model.num_layers was 4 and is 3" in message and "training.name" in message


def test_wrong_setting_is_reported_before_anything_is_written(tmp_path, capsys):
    code, output, message = state(capsys, settings(tmp_path, "training.step=5"))
    assert (code, output) == (2, "")
    assert message.startswith("error: ") and "training.steps" in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def finished_run(tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "evaluation.json").write_text(json.dumps({"bits_per_byte": 2.5, "unigram_bits_per_byte": 5.0}))
    parameters = {"stored": 4000000, "active": 1000000, "kept": 500000.4}
    (run / "description.json").write_text(json.dumps({"parameters": parameters}))
    (run / "manifest.json").write_text(json.dumps({"world_size": 2}))
    rows = [{"step": 10, "tokens": 1000, "seconds": 1.0}, {"step": 20, "tokens": 30000, "seconds": 10.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "sample.txt").write_text("def greedy\n")
    (run / "sample-drawn.txt").write_text("def drawn\n")
    return run


def test_summary_shows_quality_parameters_and_speed(finished_run, capsys):
    console = Console(width=200)
    console.print(summary.make_summary(finished_run))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row] == [
        ["validation", "2.500", "bits per byte, 0.500 times the unigram model"],
        ["unigram byte model", "5.000", "bits per byte on the same text"],
        ["parameters", "4,000,000", "stored"],
        ["active with MoE", "1,000,000", "per token, 25% of them"],
        ["needed with MoE and Q-Sparse", "500,000", "per token, 12% of them"],
        ["speed", "3,000", "tokens/s in training on 2 processes, 10 s for 20 steps"],
    ]


def test_summary_shows_both_samples_and_how_to_open_tensorboard(finished_run):
    command = [sys.executable, REPOSITORY / "launch" / "summary.py", finished_run]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.index("def greedy") < output.index("def drawn") < output.index("bits per byte")
    assert output.rstrip().endswith(f".venv/bin/python -m qsparse_moe tensorboard {finished_run.parent}")
