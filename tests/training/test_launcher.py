"""The launcher with signal handling around a fake of DeepSpeed's. Real launches are tested in tests/distributed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

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
