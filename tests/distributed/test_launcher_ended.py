"""A signal to the launcher's outer process only, to both of its processes, and to the main process of a container."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from tests.launch.test_slurm import TINY_RUN
from tests.support.launch import end, start

pytestmark = pytest.mark.distributed

# Its child is the main process of a namespace, as of a container: it gets no signal that it does not handle.
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_make_containers() -> bool:
    try:
        return subprocess.run([*CONTAINER, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


class Launched:
    """Start a run without an end on two ranks and wait for its first step."""

    def __init__(self, folder: Path, **how) -> None:
        self._log, self._run_dir = folder / "log.txt", folder / "runs" / "tiny"
        folders = [f"training.output_dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}"]
        arguments = ["--module", "qsparse_moe", "train", *TINY_RUN, "training.steps=100000", *folders]
        with self._log.open("w") as output:
            self.process = start(arguments, ranks=2, output=output, **how)
        self.below: list[psutil.Process] = []

    def __enter__(self):
        try:
            give_up = time.monotonic() + 200
            while "step 1/" not in self.said:
                time.sleep(0.05)
                assert self.process.poll() is None and time.monotonic() < give_up, self.said[-3000:]
            self.below = psutil.Process(self.process.pid).children(recursive=True)
            assert len(self.below) >= 3, "the inner launcher and two ranks"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        end([self.process])
        for rank in self.below:
            if rank.is_running():
                rank.kill()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def assert_saved(self, name: str) -> None:
        checkpoint = list_checkpoints(self._run_dir)[-1]
        step = int(checkpoint.name.removeprefix("step-"))
        assert Checkpoint(checkpoint).verify() is None
        assert f"{name}: stopped after step {step} of 100000 with a checkpoint" in self.said
        assert "Traceback" not in self.said


def test_the_ranks_save_and_stop_when_the_outer_process_has_ended(tmp_path):
    with Launched(tmp_path) as run:
        run.process.terminate()
        assert run.process.wait(5) == -signal.SIGTERM
        _, left = psutil.wait_procs(run.below, timeout=30)
        assert left == [], run.said[-3000:]
    run.assert_saved("SIGTERM")


def test_ctrl_c_ends_our_launcher_after_the_ranks_and_without_its_traceback(tmp_path):
    with Launched(tmp_path, launcher="qsparse_moe.training.launcher") as run:
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.process.wait(30) == 128 + signal.SIGINT
        assert not [rank for rank in run.below if rank.is_running()]
    run.assert_saved("SIGINT")


@pytest.mark.skipif(not can_make_containers(), reason="needs to be allowed a process namespace (unshare --pid)")
def test_as_the_main_process_of_a_container_our_launcher_passes_sigterm_on_and_ends_after_the_ranks(tmp_path):
    with Launched(tmp_path, launcher="qsparse_moe.training.launcher", prefix=CONTAINER) as run:
        run.below[0].send_signal(signal.SIGTERM)
        assert run.process.wait(30) == 128 + signal.SIGTERM, run.said[-3000:]
    run.assert_saved("SIGTERM")
