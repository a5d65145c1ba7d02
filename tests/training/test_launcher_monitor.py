from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qsparse_moe.training import launcher_monitor
from qsparse_moe.training.launcher_monitor import LauncherMonitor, launcher_processes

# A process that is taken for the launcher by its command line, and starts the rest of that command line.
PARENT = "import subprocess, sys; subprocess.Popen(sys.argv[2:]).wait()"
OUTER = [sys.executable, "-c", PARENT, "deepspeed.launcher.runner"]
INNER = [sys.executable, "-c", PARENT, "deepspeed.launcher.launch"]
NOBODY = [sys.executable, "-c", PARENT, "nohup"]
RANK = """
import time
from qsparse_moe.training.interrupt import StopSignals, until_stopped
def work():
    print("at work", flush=True)
    if AT_ONCE:
        time.sleep(60)
    with StopSignals() as signals:
        end = time.monotonic() + SECONDS
        while not signals.received and time.monotonic() < end:
            time.sleep(0.05)
        print(signals.received, flush=True)
        time.sleep(1.5)  # once only: nothing ends it while it saves
    print("saved", flush=True)
    return 0
until_stopped(work)
"""


def rank(*, at_once=False, seconds=60):
    return [sys.executable, "-c", RANK.replace("AT_ONCE", str(at_once)).replace("SECONDS", str(seconds))]


@pytest.fixture
def start():
    started = []

    def begin(command):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        assert process.stdout.readline() == "at work\n"
        started.extend(psutil.Process(process.pid).children(recursive=True))
        return process

    yield begin
    for process in started:
        if isinstance(process, subprocess.Popen):
            process.kill()
            process.wait()
            process.stdout.close()
        elif process.is_running():
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("victim", ["outer", "inner"])
def test_a_rank_stops_when_a_process_of_its_launcher_has_ended(start, number, victim):
    process = start([*OUTER, *INNER, *rank()])
    pid = process.pid if victim == "outer" else psutil.Process(process.pid).children()[0].pid
    os.kill(pid, number)
    said = process.stdout.read()
    assert said == "SIGTERM: stopping after this step, with a checkpoint\n15\nsaved\n"


def test_a_rank_ends_at_once_when_there_is_nothing_to_save(start):
    process = start([*OUTER, *INNER, *rank(at_once=True)])
    process.terminate()
    assert process.stdout.read() == "error: stopped by SIGTERM\n"


def test_the_end_of_another_parent_process_does_not_stop_the_run(start):
    for command in ([*NOBODY, *INNER], [*NOBODY]):
        process = start([*command, *rank(seconds=4)])
        process.terminate()
        assert process.stdout.read() == "0\nsaved\n"


def test_a_pending_signal_is_not_followed_by_another(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    gone = launcher_monitor._read_process(child.pid)
    child.communicate(b"\n")
    sent = []
    monkeypatch.setattr(launcher_monitor, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(launcher_monitor, "launcher_processes", lambda: [gone])
    monkeypatch.setattr(launcher_monitor.os, "kill", lambda *given: sent.append(given))
    with LauncherMonitor(is_stopping=lambda: True):
        time.sleep(0.2)
    assert sent == []
    with LauncherMonitor(is_stopping=lambda: False):
        time.sleep(0.2)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_reused_process_id_is_not_mistaken_for_the_launcher():
    me = launcher_monitor._read_process(os.getpid())
    assert me.parent == os.getppid()
    assert launcher_monitor._is_there(me)
    assert not launcher_monitor._is_there(me._replace(start=str(int(me.start) - 1)))


def test_without_proc_the_environment_identifies_the_launcher(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher_monitor, "_PROCESSES", tmp_path / "gone")
    for name in ("CROSS_RANK", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launcher_processes() == []
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    (parent,) = launcher_processes()
    assert parent.pid == os.getppid() and launcher_monitor._is_there(parent)
