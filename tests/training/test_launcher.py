"""The launcher with signal handling around a fake of DeepSpeed's. Real launches are tested in tests/distributed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# A library whose launcher starts a substitute of the inner one, or nothing; both print how far they are.
PROGRAM = """
import signal, subprocess, sys, time, types
INNER = '''
import signal, sys, time
def end(*_):
    print("stopped", flush=True); sys.exit(1)
signal.signal(signal.SIGTERM, end)
print("inner", flush=True)
time.sleep(60)
'''
def launch():
    if MODE == "imports":
        print("inner", flush=True)
        time.sleep(60)
    inner = [sys.executable, "-c", INNER, "deepspeed.launcher.launch"]
    if code := subprocess.Popen(inner).wait() if MODE == "runs" else CODE:
        sys.exit(code)
library = types.ModuleType("deepspeed.launcher.runner")
library.main = launch
sys.modules |= {"deepspeed": library, "deepspeed.launcher": library, "deepspeed.launcher.runner": library}
if IGNORED:
    signal.signal(IGNORED, signal.SIG_IGN)
from qsparse_moe.training import launcher
launcher.main()
"""


def start(mode="runs", *, ignored=0, code=0):
    program = f"MODE, IGNORED, CODE = {mode!r}, {int(ignored)}, {code}\n{PROGRAM}"
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_as_sigterm_and_it_ends_after_what_it_started(number):
    with start() as process:
        assert process.stdout.readline() == "inner\n"
        process.send_signal(number)
        said, complaints = process.communicate(timeout=30)
    assert (process.returncode, said, complaints) == (128 + number, "stopped\n", "")


def test_before_any_process_is_started_it_ends_at_once():
    with start("imports") as process:
        assert process.stdout.readline() == "inner\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
        assert process.stderr.read() == ""


def test_a_signal_that_it_was_started_to_ignore_stays_ignored():
    """``launch/slurm.sbatch`` hides Slurm's warning from the launcher, because it is meant for the ranks."""
    with start(ignored=signal.SIGUSR1) as process:
        assert process.stdout.readline() == "inner\n"
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("code", [0, 2])
def test_without_a_signal_the_exit_code_is_the_launchers(code):
    with start("ends", code=code) as process:
        assert process.wait(30) == code


RESTARTED = """
import os, sys, types
from pathlib import Path
def launch():
    words = sys.argv[1:]
    folder = Path(FOLDER) / "run"
    step = 2 if words[-1] == "training.resume=true" else 1
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    print(" ".join(words), flush=True)
    if step == 1:
        Path(os.environ["QSPARSE_MOE_ERROR_FILE"]).write_text("rank 0: broken")
        sys.exit(1)
library = types.ModuleType("deepspeed.launcher.runner")
library.main = launch
sys.modules |= {"deepspeed": library, "deepspeed.launcher": library, "deepspeed.launcher.runner": library}
"""


def test_a_failed_run_is_restarted_in_a_process_of_its_own(tmp_path):
    # Every Python process of the test begins with the substitute.
    (tmp_path / "sitecustomize.py").write_text(f"FOLDER = {str(tmp_path)!r}\n{RESTARTED}")
    config = str(REPOSITORY / "configs" / "tiny.yaml")
    settings = [config, f"training.output_dir={tmp_path}", "training.name=run", "training.steps=2"]
    settings.append("training.warmup_steps=1")
    command = [sys.executable, "-m", "qsparse_moe.training.launcher", "--max_restarts", "1", "--quiet", "--module"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    result = subprocess.run(
        [*command, "qsparse_moe", "train", *settings], env=environment, capture_output=True, text=True, timeout=60
    )
    first = " ".join(["--quiet", "--module", "qsparse_moe", "train", *settings])
    assert result.stdout.splitlines() == [first, f"{first} training.resume=true"]
    assert result.stderr.splitlines() == [
        "qsparse_moe: restart 1 of at most 1: the run ended with exit code 1 (rank 0: broken), and the newest "
        f"checkpoint in {tmp_path / 'run'} is of step 1"
    ]
    assert result.returncode == 0


def test_a_wrong_number_of_restarts_is_refused():
    command = [sys.executable, "-m", "qsparse_moe.training.launcher", "--max_restarts", "many"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        'error: --max_restarts ("many") must be a whole number: how often a failed run is restarted\n'
    )
