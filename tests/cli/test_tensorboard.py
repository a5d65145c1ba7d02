"""The verb that opens TensorBoard."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from qsparse_moe.cli import tensorboard
from qsparse_moe.cli.app import run


def test_tensorboard_is_started_on_the_folder_and_its_code_passed_on(tmp_path, monkeypatch):
    started = []

    def start(command, *, check):
        started.append(command)
        return SimpleNamespace(returncode=7)

    monkeypatch.setattr(tensorboard.subprocess, "run", start)
    assert run(["tensorboard", str(tmp_path), "--port", "0"]) == 7
    assert started == [[sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0"]]


def test_missing_folder_is_refused(tmp_path, capsys):
    assert run(["tensorboard", str(tmp_path / "none")]) == 2
    assert "none does not exist; name a run folder or the folder that holds them" in capsys.readouterr().err
