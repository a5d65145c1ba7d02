"""The progress of a run: lines where the output is no terminal, one bar where it is."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from qsparse_moe.cli.progress import TrainingProgress
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.runs.report import RunContext, StepReport


def report(step, *, validation=None):
    return StepReport(
        step=step,
        tokens=step * 1024,
        seconds=1.0,
        losses={"loss": 3.21098, "lm_loss": 3.2},
        stats={},
        router_bias_LE=None,
        grad_norm=1.0,
        layer_grad_norms=None,
        learning_rate=1e-3,
        sparsity=0.5,
        step_seconds=0.1,
        tokens_per_second=12345.6,
        memory={},
        validation=validation,
    )


def context(start_step=0):
    return RunContext(
        run_dir=Path("runs/x"),
        config=RunConfig(),
        start_step=start_step,
        start_tokens=0,
        start_seconds=0.0,
        world_size=1,
        tokens_per_step=1024,
        num_parameters=1,
        engine="torch",
        device="cpu",
        device_name="",
        backend="loop",
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    with TrainingProgress(20) as progress:
        progress.begin(context())
        progress(report(10))
        progress(report(20, validation={"bits_per_byte": 2.5}))
    assert capsys.readouterr().err.splitlines() == [
        "step 10/20  loss 3.2110  12,346 tokens/s",
        "step 20/20  loss 3.2110  12,346 tokens/s  validation 2.5000 bits/byte",
    ]
    assert progress.last.step == 20


def use_terminal(monkeypatch):
    """Inside the test: pytest puts its own stderr there between a fixture and the test."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm-256color")
    return screen


def test_progress_is_one_bar_on_a_terminal(monkeypatch):
    terminal = use_terminal(monkeypatch)
    with TrainingProgress(20) as progress:
        progress.begin(context(start_step=5))
        progress(report(10))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"training .*10/20 loss 3\.2110  12,346 tokens/s", shown)
    assert "step 10/20" not in shown


def test_the_bar_of_a_resumed_run_begins_where_the_run_does(monkeypatch):
    terminal = use_terminal(monkeypatch)
    with TrainingProgress(20) as progress:
        progress.begin(context(start_step=5))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.findall(r"\d+/20", shown) and set(re.findall(r"\d+/20", shown)) == {"5/20"}


def test_error_leaves_no_bar_behind(monkeypatch):
    terminal = use_terminal(monkeypatch)
    with pytest.raises(RuntimeError, match="mid-run"), TrainingProgress(20) as progress:
        progress.begin(context())
        raise RuntimeError("mid-run")
    # The cursor is shown again, so the live display has ended.
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")


def test_an_error_before_the_first_step_does_not_disturb_the_bar(monkeypatch):
    use_terminal(monkeypatch)
    with pytest.raises(RuntimeError, match="early"), TrainingProgress(20):
        raise RuntimeError("early")
