from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from qsparse_moe.training.interrupt import (
    SignalsWhileEnding,
    Stopped,
    StopSignals,
    is_stop_requested,
    until_stopped,
)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_is_recorded_and_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopSignals() as signals:
        assert signals.received == 0
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(
    ("number", "text", "code"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGUSR1, "SIGUSR1", 138)],
)
def test_the_end_by_a_signal_has_its_name_and_the_code_of_shells(number, text, code):
    stopped = Stopped(number)
    assert (str(stopped), stopped.number, stopped.exit_code) == (f"stopped by {text}", number, code)
    assert not isinstance(stopped, Exception)


def test_a_stop_is_requested_by_a_recorded_signal_only_and_logged_once(caplog):
    assert not is_stop_requested()
    with SignalsWhileEnding() as ending, StopSignals() as signals, caplog.at_level(logging.WARNING):
        ending.received = signal.SIGTERM
        assert not is_stop_requested()
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert is_stop_requested() and signals.received == signal.SIGTERM
    assert caplog.messages == ["SIGTERM: stopping after this step, with a checkpoint"]
    assert not is_stop_requested()


def test_handlers_that_are_installed_twice_are_restored_once_to_those_from_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signals = StopSignals()
    signals.release()
    signals.catch()
    signals.catch()
    assert [signal.getsignal(number) for number in before] == [signals._caught] * 3
    with StopSignals() as inner:
        send(signal.SIGTERM)
        assert (inner.received, signals.received) == (signal.SIGTERM, 0)
    send(signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    signals.release()
    signals.release()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(("rank", "line"), [(None, True), ("0", True), ("1", False)])
def test_one_rank_prints_the_reason(rank, line, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    def work():
        raise Stopped(signal.SIGTERM)

    assert until_stopped(work) == 143
    assert capsys.readouterr() == ("", "error: stopped by SIGTERM\n" if line else "")


def test_a_ctrl_c_and_the_launchers_sigterm_after_it_are_one_request():
    with StopSignals() as signals:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert signals.received == signal.SIGINT


def test_the_warning_of_slurm_is_recorded_as_sigterm_is():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert signals.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_ctrl_c_ends_the_process_at_once():
    script = """
import os, signal
from qsparse_moe.training.interrupt import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    print(signals.received, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ended.stdout == "2\n"
    assert "SIGINT: stopping after this step, with a checkpoint" in ended.stderr


def test_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignals() as signals:
            seen.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


def run_script(script, **environment):
    before = "import os, signal, sys, time\nfrom qsparse_moe.training.interrupt import StopSignals, until_stopped\n"
    return subprocess.run(
        [sys.executable, "-c", before + script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")]
)
def test_work_ends_at_once_with_its_finally_clauses_and_one_line(number, name):
    script = f"""
def work():
    try:
        os.kill(os.getpid(), {int(number)})
        time.sleep(60)
    finally:
        print("cleaned up")
sys.exit(until_stopped(work))
"""
    ended = run_script(script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (
        128 + number,
        "cleaned up\n",
        f"error: stopped by {name}\n",
    )
    assert run_script(script, RANK="1").stderr == ""


def test_work_that_runs_no_handler_is_ended_from_outside():
    script = """
import ctypes, threading
def work():
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
    libc.pthread_mutex_lock(mutex)  # its own: it waits without an end, as a collective does
    print("it continued")
    return 0
sys.exit(until_stopped(work))
"""
    ended = run_script(script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", "error: stopped by SIGTERM\n")


def test_work_ends_normally_without_a_signal_and_the_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    assert until_stopped(lambda: 7) == 7
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    end = time.monotonic() + 5
    while "signals" in [thread.name for thread in threading.enumerate()]:
        assert time.monotonic() < end, "the thread stays"
        time.sleep(0.01)


def test_signals_that_are_recorded_meanwhile_do_not_end_it():
    script = """
def work():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        print(signals.received)
    return 0
sys.exit(until_stopped(work))
"""
    ended = run_script(script)
    assert (ended.returncode, ended.stdout) == (0, "15\n")


@pytest.mark.parametrize("catcher", ["until_stopped(work)", "noted()"])
def test_forked_worker_is_ended_by_its_parent_as_any_other(catcher):
    script = f"""
def work():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1")
        time.sleep(60)
        os._exit(1)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    time.sleep(3)
    return 0
def noted():
    with StopSignals():
        return work()
sys.exit({catcher})
"""
    ended = run_script(script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "-15\n", "")


def test_a_process_that_is_already_ending_prints_its_reason_first():
    """A lost rank is named although the launcher sends SIGTERM because of it; the previous handler is restored."""
    script = """
from qsparse_moe.training.interrupt import SignalsWhileEnding
def work():
    with SignalsWhileEnding():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3)
        print("rank 1 is gone", flush=True)
        if len(sys.argv) > 1:
            os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
sys.exit(until_stopped(work))
"""
    ended = run_script(script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "rank 1 is gone\n", "error: stopped by SIGTERM\n")
    assert run_script("sys.argv.append('twice')\n" + script).returncode == -signal.SIGINT
