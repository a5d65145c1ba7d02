"""Detects that the deepspeed launcher has ended before its ranks, and then stops this rank as SIGTERM does.

The launcher's outer process (DeepSpeed 0.19.8), to which ``kill``, ``timeout``, and workload managers send signals,
ends on SIGTERM without notifying the ranks. Each rank therefore checks for itself. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_POLL_SECONDS = 1.0
_PROCESSES = Path("/proc")
LAUNCHED = "deepspeed.launcher.launch"
"""Module of the launcher's inner process, the parent of a machine's ranks, as it appears in its command line."""
_OUTER = ("deepspeed.launcher.runner", "qsparse_moe.training.launcher")
_OUTER_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds")


class Process(NamedTuple):
    """A process of this machine. Its number may be reused later, but not with the same start time."""

    pid: int
    start: str
    """Start time in clock ticks since the machine booted."""
    parent: int


class LauncherMonitor:
    """A context manager that sends SIGTERM to this process once if the launcher that started it has ended.

    It does nothing without a launcher above this process, or if a signal has already asked the process to stop.
    Without ``/proc`` it detects only the end of the inner process, the parent of the ranks.
    """

    def __init__(self, *, is_stopping: Callable[[], bool]) -> None:
        """Args: ``is_stopping()`` returns whether a signal has asked this process to stop."""
        self._is_stopping = is_stopping
        self._is_left = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> LauncherMonitor:
        processes = launcher_processes()
        if processes:
            thread = threading.Thread(target=self._monitor, args=(processes,), name="launcher-monitor", daemon=True)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_left.set()

    def _monitor(self, processes: list[Process]) -> None:
        while not self._is_left.wait(_POLL_SECONDS):
            # An orphan gets another parent, even if the number of its old one is reused.
            if os.getppid() == processes[0].pid and all(map(_is_there, processes)):
                continue
            # The lock keeps the signal from being sent after the exit, when the default action would end the process.
            with self._lock:
                if not self._is_left.is_set() and not self._is_stopping():
                    os.kill(os.getpid(), signal.SIGTERM)
            return


def launcher_processes() -> list[Process]:
    """Return the processes of the deepspeed launcher above this one, nearest first; empty without a launcher."""
    if not _PROCESSES.is_dir():
        # Of all launchers only deepspeed sets these two for its ranks.
        is_launched = "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ
        return [Process(os.getppid(), "", 0)] if is_launched else []
    above: list[Process] = []
    process = _read_process(os.getppid())
    while process is not None:
        above.append(process)
        words = command_of(process.pid)
        process = _read_process(process.parent)
        if LAUNCHED in words:
            return [*above, process] if process is not None and _is_outer(command_of(process.pid)) else above
    return []


def _is_outer(words: list[str]) -> bool:
    return any(name in words for name in _OUTER) or any(Path(word).name in _OUTER_PROGRAMS for word in words[:2])


def _is_there(process: Process) -> bool:
    if not _PROCESSES.is_dir():
        return True  # os.getppid shows the end of the parent.
    now = _read_process(process.pid)
    return now is not None and now.start == process.start


def _read_process(pid: int) -> Process | None:
    """Return the process with the number ``pid``, or None if there is none or it is a zombie."""
    try:
        text = (_PROCESSES / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name of the program is in parentheses and may contain any character, including parentheses.
    state, parent, *others = text.rpartition(")")[2].split()
    return None if state in "ZX" else Process(pid, others[17], int(parent))


def children() -> list[int]:
    """Return the numbers of this process's running children; an empty list without ``/proc``."""
    pids = [int(path.name) for path in _PROCESSES.iterdir() if path.name.isdecimal()] if _PROCESSES.is_dir() else []
    return [pid for pid in pids if (process := _read_process(pid)) is not None and process.parent == os.getpid()]


def command_of(pid: int) -> list[str]:
    """Return the words of a process's command line; an empty list if there is no such process."""
    try:
        return (_PROCESSES / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
