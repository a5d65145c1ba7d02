"""Notices that the deepspeed launcher has ended before its ranks, and lets this rank stop as if it had been told to.

The launcher's outer process (DeepSpeed 0.19.8), the one that ``kill``, ``timeout`` and a workload manager know, ends
on SIGTERM without a word to the ranks. So each rank looks for itself. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_LOOK_SECONDS = 1.0
_PROCESSES = Path("/proc")
LAUNCHED = "deepspeed.launcher.launch"
"""Name of the launcher's inner process, in its command line: the parent of a machine's ranks."""
_OUTER = ("deepspeed.launcher.runner", "qsparse_moe.training.launcher")
_OUTER_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds")


class Process(NamedTuple):
    """A process of this machine. Its number may be given to another one later, but not with the same start."""

    pid: int
    start: str
    """When it began, in clock ticks since the machine did."""
    parent: int


class LauncherWatch:
    """While it is entered, sends SIGTERM to this process once, when the launcher that started it has ended.

    It does nothing where no launcher is above this process, and nothing where a signal has already asked it to stop.
    Without ``/proc`` only the end of the inner process, the parent of the ranks, is noticed.
    """

    def __init__(self, *, is_stopping: Callable[[], bool]) -> None:
        """``is_stopping()`` tells whether a signal has asked this process to stop."""
        self._is_stopping = is_stopping
        self._is_left = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> LauncherWatch:
        processes = launcher_processes()
        if processes:
            thread = threading.Thread(target=self._watch, args=(processes,), name="launcher-watch", daemon=True)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._is_left.set()

    def _watch(self, processes: list[Process]) -> None:
        while not self._is_left.wait(_LOOK_SECONDS):
            if os.getppid() == processes[0].pid and all(map(_is_there, processes)):
                continue
            with self._lock:
                if not self._is_left.is_set() and not self._is_stopping():
                    os.kill(os.getpid(), signal.SIGTERM)
            return


def launcher_processes() -> list[Process]:
    """Return the processes of the deepspeed launcher above this one, the nearest first; none without a launcher."""
    if not _PROCESSES.is_dir():
        # What the launcher, and no other, sets for its ranks.
        is_launched = "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ
        return [Process(os.getppid(), "", 0)] if is_launched else []
    above: list[Process] = []
    process = _look(os.getppid())
    while process is not None:
        above.append(process)
        words = command_of(process.pid)
        process = _look(process.parent)
        if LAUNCHED in words:
            return [*above, process] if process is not None and _is_outer(command_of(process.pid)) else above
    return []


def _is_outer(words: list[str]) -> bool:
    return any(name in words for name in _OUTER) or any(Path(word).name in _OUTER_PROGRAMS for word in words[:2])


def _is_there(process: Process) -> bool:
    if not _PROCESSES.is_dir():
        return True  # os.getppid tells of it
    now = _look(process.pid)
    return now is not None and now.start == process.start


def _look(pid: int) -> Process | None:
    """None where there is no such process, or nothing but its exit code is left of it."""
    try:
        text = (_PROCESSES / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name stands in parentheses and may hold any character.
    state, parent, *others = text.rpartition(")")[2].split()
    return None if state in "ZX" else Process(pid, others[17], int(parent))


def children() -> list[int]:
    """Return the numbers of the processes below this one that have not ended; none without ``/proc``."""
    pids = [int(path.name) for path in _PROCESSES.iterdir() if path.name.isdecimal()] if _PROCESSES.is_dir() else []
    return [pid for pid in pids if (process := _look(pid)) is not None and process.parent == os.getpid()]


def command_of(pid: int) -> list[str]:
    """Return the words of a process's command line; none where there is no such process."""
    try:
        return (_PROCESSES / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
