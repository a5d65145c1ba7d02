"""SIGTERM to the launcher's outer process alone, which tells nobody of it."""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from tests.launch.test_slurm import TINY_RUN
from tests.support.launch import end, start

pytestmark = pytest.mark.distributed


def test_the_ranks_save_and_stop_when_the_outer_process_has_ended(tmp_path):
    log, run_dir = tmp_path / "log.txt", tmp_path / "runs" / "tiny"
    folders = [f"training.output_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    arguments = ["--module", "qsparse_moe", "train", *TINY_RUN, "training.steps=100000", *folders]
    with log.open("w") as output:
        process = start(arguments, ranks=2, output=output)
    below = []
    try:
        give_up = time.monotonic() + 200
        while "step 1/" not in log.read_text():
            time.sleep(0.05)
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()[-3000:]
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3, "the inner launcher and two ranks"
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM
        _, left = psutil.wait_procs(below, timeout=30)
        assert left == [], log.read_text()[-3000:]
    finally:
        end([process])
        for rank in below:
            if rank.is_running():
                rank.kill()
    checkpoint = list_checkpoints(run_dir)[-1]
    step = int(checkpoint.name.removeprefix("step-"))
    assert Checkpoint(checkpoint).verify() is None
    said = log.read_text()
    assert f"SIGTERM: stopped after step {step} of 100000 with a checkpoint" in said
    assert "Traceback" not in said
