"""Ctrl-C, SIGTERM, SIGUSR1: the end of the process at once, or, once there are steps to save, a wish to the loop."""

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

from qsparse_moe.training.launcher_watch import LauncherWatch

logger = logging.getLogger(__name__)

# SLURM warns of a job's end by SIGUSR1: sbatch --signal=USR1@300.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# For the finally clauses of whatever is at work; the longest looks for 3 s which ranks are gone. A process that
# stands in a call of C or C++ runs none.
_GRACE_SECONDS = 4.0


class Stopped(BaseException):
    """A signal asks the process to end. Like KeyboardInterrupt it is no ``Exception``, which much code catches."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells count."""
        return 128 + self.number


def until_stopped(work: Callable[[], int]) -> int:
    """Call ``work`` and return its exit code; where SIGINT, SIGTERM or SIGUSR1 ends it, say so and return the signal's.

    The end of the deepspeed launcher above this process counts as SIGTERM; see ``LauncherWatch``.
    From its first line to its last the process ends within seconds, also where Python cannot run a handler because it
    waits in C++ for another rank. ``work`` may handle the signals in another way for a part of its time, as
    ``StopSignals`` does.
    """
    try:
        with _EndAtOnce() as signals, LauncherWatch(is_stopping=lambda: signals.is_stopping):
            return work()
    except Stopped as stopped:
        _print_stopped(stopped)
        return stopped.exit_code


class CaughtSignals:
    """While it is entered, SIGINT, SIGTERM and SIGUSR1 go to ``_caught``; afterwards to what handled them before.

    In another thread than the main one, where Python allows no handlers, and in forked processes, signals keep the
    effect that they had before.
    """

    def __init__(self) -> None:
        self._previous: dict[int, object] = {}

    def catch(self) -> None:
        """Begin to catch the signals; nothing changes where they are caught already."""
        if not self._previous and threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._caught)
            _catching.append(self)

    def release(self) -> None:
        """Let what handled the signals before do so again."""
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
    """While it is entered, the first stop signal is only noted; a second Ctrl-C ends the process at once.

    Under the deepspeed launcher a Ctrl-C reaches a rank twice, from the terminal and as the launcher's SIGTERM, so
    SIGTERM never counts as the second. The launcher (0.19.8) kills a rank that is still there 30 s after its SIGTERM: a
    checkpoint must be written by then. Its outer process, ``deepspeed`` itself, ends on SIGTERM and passes it on to
    nobody: ``LauncherWatch`` notices that in every rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = 0
        """Number of the signal, 0 while there is none."""

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            logger.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)
        if number == signal.SIGINT:
            # Not a handler of ours: Python runs none while a collective waits for the other ranks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_told_to_stop() -> bool:
    """Return whether a signal has asked this process to stop after its step."""
    return any(isinstance(signals, StopSignals) and signals.received for signals in list(_catching))


class EndingAlready(CaughtSignals):
    """While it is entered, SIGTERM has no effect and the second Ctrl-C ends the process at once.

    For a process that ends by itself and first says why: the launcher sends SIGTERM within a second to the ranks that
    are left when one is gone.
    """

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


class _EndAtOnce(CaughtSignals):
    """Raises ``Stopped`` in the main thread; where that does not end the process in time, a thread of ours does.

    The interpreter writes the number of every signal into a socket as it arrives, whatever the main thread does. The
    thread reads it there, and does nothing while another object handles the signals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_stopping = False
        """Whether a signal has asked the process to stop, whoever handles it."""
        self._is_left = threading.Event()
        self._wakeup: socket.socket | None = None
        self._previous_wakeup = -1

    def catch(self) -> None:
        super().catch()
        if self._previous and self._wakeup is None:
            numbers, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(numbers,), name="signals", daemon=True).start()

    def release(self) -> None:
        self._is_left.set()
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            self._wakeup.close()
            self._wakeup = None
        super().release()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    def _watch(self, numbers: socket.socket) -> None:
        with numbers:
            while received := numbers.recv(1):
                number = received[0]
                self.is_stopping = self.is_stopping or number in _STOP_SIGNALS
                is_ours = number in _STOP_SIGNALS and signal.getsignal(number) == self._caught
                if is_ours and not self._is_left.wait(_GRACE_SECONDS):
                    stopped = Stopped(number)
                    _print_stopped(stopped)
                    os._exit(stopped.exit_code)


def _print_stopped(stopped: Stopped) -> None:
    """One line, from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {stopped}", file=sys.stderr, flush=True)


_catching: list[CaughtSignals] = []


def _release_after_fork() -> None:
    """In a forked worker: its parent ends it by SIGTERM, which is no wish of the user's."""
    with suppress(ValueError):  # forked by another thread
        for signals in reversed(list(_catching)):
            signals.release()


os.register_at_fork(after_in_child=_release_after_fork)
