"""The verb that opens TensorBoard."""

from __future__ import annotations

import sys

from qsparse_moe.cli import tensorboard
from qsparse_moe.cli.app import run


def test_tensorboard_takes_the_place_of_the_process_with_the_folder_of_runs(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(tensorboard.os, "execv", lambda program, command: started.append((program, command)))
    assert run(["tensorboard", str(tmp_path), "--port", "0"]) == 0
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0"]
    assert started == [(sys.executable, command)]


def test_missing_folder_is_refused(tmp_path, capsys):
    assert run(["tensorboard", str(tmp_path / "none")]) == 2
    assert "none does not exist; name a run folder or the folder that holds them" in capsys.readouterr().err
