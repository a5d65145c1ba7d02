"""A rank that is killed in a run with restarts: the launcher starts the run again, and it ends as if nothing was."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from qsparse_moe.metrics.jsonl import read_metrics
from tests.launch.test_slurm import TINY_RUN
from tests.support.launch import end, start

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_run_whose_rank_is_killed_goes_on_from_its_checkpoint(tmp_path):
    log, run_dir = tmp_path / "log.txt", tmp_path / "runs" / "tiny"
    settings = [f"training.output_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    settings += ["training.steps=100", "training.checkpoint_interval=20", "training.warmup_steps=1"]
    arguments = ["--module", "qsparse_moe", "train", *TINY_RUN, *settings]
    with log.open("w") as output:
        options = ["--max_restarts", "2", *arguments]
        process = start(options, ranks=2, output=output, launcher="qsparse_moe.training.launcher")
    try:
        killed_after = _kill_a_rank(process, run_dir)
        assert process.wait(400) == 0, log.read_text()[-3000:]
    finally:
        end([process])
    said = log.read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("qsparse_moe: ")]
    assert line.startswith("qsparse_moe: restart 1 of at most 2: the run ended with exit code ")
    number = int(line.rsplit(" ", 1)[1])
    assert killed_after <= number < 100 and number % 20 == 0
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [*range(1, 101)]


def _kill_a_rank(launcher: subprocess.Popen[bytes], run_dir: Path) -> int:
    """Kill one rank once a checkpoint is complete; return the checkpoint's step."""
    give_up = time.monotonic() + 400
    while not (found := sorted((run_dir / "checkpoints").glob("step-*"))):
        assert launcher.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    below = psutil.Process(launcher.pid).children(recursive=True)
    rank = next(process for process in below if any("--local_rank=1" in word for word in process.cmdline()))
    rank.kill()
    return int(found[0].name.removeprefix("step-"))
