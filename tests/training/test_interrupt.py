from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from qsparse_moe.training.interrupt import StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_is_noted_and_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopSignals() as signals:
        assert signals.received == 0
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_ctrl_c_and_the_launchers_sigterm_after_it_are_one_wish():
    with StopSignals() as signals:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert signals.received == signal.SIGINT


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
