"""Handling of SIGINT (Ctrl-C), SIGTERM, and SIGUSR1: end the process at once, or ask the loop to stop after a step."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from qsparse_moe.training.launcher_monitor import LauncherMonitor

logger = logging.getLogger(__name__)

# Slurm announces the end of a job by SIGUSR1: sbatch --signal=USR1@300.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Time for finally clauses, the longest of which checks for 3 s which ranks are lost. A process that is blocked in a
# call of C or C++ does not run them at all.
_GRACE_SECONDS = 4.0


class Stopped(BaseException):
    """Raised when a signal ends the process. Like KeyboardInterrupt it is no ``Exception``, which much code catches."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as in shells."""
        return 128 + self.number


def until_stopped(work: Callable[[], int]) -> int:
    """Call ``work`` and return its exit code; if a stop signal ends it, print a message and return the signal's code.

    The end of the deepspeed launcher above this process counts as SIGTERM; see ``LauncherMonitor``. The process ends
    within seconds of a signal, even if Python cannot run a handler because it waits in C++ for another rank. ``work``
    may handle the signals differently for some time, as ``StopSignals`` does.
    """
    try:
        with _EndAtOnce() as signals, LauncherMonitor(is_stopping=lambda: signals.is_stopping):
            return work()
    except Stopped as stopped:
        _print_stopped(stopped)
        return stopped.exit_code


class CaughtSignals:
    """A context manager in which ``_caught`` handles SIGINT, SIGTERM, and SIGUSR1; on exit it restores the handlers.

    It has no effect outside the main thread, where Python allows no handlers, and in forked processes.
    """

    def __init__(self) -> None:
        self._previous: dict[int, object] = {}

    def catch(self) -> None:
        """Install the handlers; calling it again has no effect."""
        if not self._previous and threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._caught)
            # A fork copies the handlers; _release_after_fork must find who installed them.
            _catching.append(self)

    def release(self) -> None:
        """Restore the previous handlers."""
        if self._previous:
            _catching.remove(self)
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        self.catch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopSignals(CaughtSignals):
    """A context manager that records the first stop signal in ``received``; a second Ctrl-C ends the process at once.

    Under the deepspeed launcher a Ctrl-C reaches a rank twice, from the terminal and as the launcher's SIGTERM, so
    SIGTERM never counts as the second signal. The launcher (0.19.8) kills a rank 30 s after its SIGTERM; a checkpoint
    must be written by then. Its outer process, ``deepspeed`` itself, ends on SIGTERM without forwarding it, which
    ``LauncherMonitor`` detects in every rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = 0
        """Number of the first signal, 0 before there is one."""

    def _caught(self, number: int, frame: FrameType | None) -> None:
        # The first signal determines the exit code.
        if not self.received:
            self.received = number
            logger.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)
        if number == signal.SIGINT:
            # The default action and not a Python handler, which would not run while a collective waits for other ranks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_stop_requested() -> bool:
    """Return whether a signal has asked this process to stop after its step."""
    return any(isinstance(signals, StopSignals) and signals.received for signals in list(_catching))


class SignalsWhileEnding(CaughtSignals):
    """A context manager in which SIGTERM has no effect and a second Ctrl-C ends the process at once.

    It serves a process that is about to end by itself and first reports the reason: when a rank is lost, the launcher
    sends SIGTERM to the others within a second.
    """

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


class _EndAtOnce(CaughtSignals):
    """Raises ``Stopped`` in the main thread; if that does not end the process in time, a background thread does.

    The interpreter writes the number of every signal to a socket when it arrives, whatever the main thread is doing.
    The background thread reads it there, and does nothing while another object handles the signals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_stopping = False
        """Whether a stop signal has arrived, whichever object handles it."""
        self._is_left = threading.Event()
        self._wakeup: socket.socket | None = None
        self._previous_wakeup = -1

    def catch(self) -> None:
        super().catch()
        if self._previous and self._wakeup is None:
            numbers, self._wakeup = socket.socketpair()
            # set_wakeup_fd requires it: a signal handler must never block.
            self._wakeup.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._read_signals, args=(numbers,), name="signals", daemon=True).start()

    def release(self) -> None:
        self._is_left.set()
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            self._wakeup.close()
            self._wakeup = None
        super().release()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    def _read_signals(self, numbers: socket.socket) -> None:
        with numbers:
            while received := numbers.recv(1):
                number = received[0]
                self.is_stopping = self.is_stopping or number in _STOP_SIGNALS
                is_ours = number in _STOP_SIGNALS and signal.getsignal(number) == self._caught
                if is_ours and not self._is_left.wait(_GRACE_SECONDS):
                    stopped = Stopped(number)
                    _print_stopped(stopped)
                    # sys.exit would only end this thread.
                    os._exit(stopped.exit_code)


def _print_stopped(stopped: Stopped) -> None:
    """Print the error line; only rank 0 does, since the launcher stops every rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {stopped}", file=sys.stderr, flush=True)


_catching: list[CaughtSignals] = []


def _release_after_fork() -> None:
    """Restore the handlers in a forked worker, which its parent ends by SIGTERM without a request of the user."""
    with suppress(ValueError):  # Python allows no handlers if another thread than the main one forked.
        for signals in reversed(list(_catching)):
            signals.release()


os.register_at_fork(after_in_child=_release_after_fork)
