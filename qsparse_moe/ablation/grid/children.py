"""Processes of runs that end together: the first signal lets each save its checkpoint, a second Ctrl-C does not."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from qsparse_moe.training.interrupt import CaughtSignals

# The launcher (0.19.8) kills a rank that is still there 30 s after its SIGTERM.
_PATIENCE_SECONDS = 45.0


class Children(CaughtSignals):
    """While it is entered, SIGINT, SIGTERM and SIGUSR1 go to the children as SIGTERM, and no new one is started.

    Each child leads a session of its own: a Ctrl-C of the terminal reaches it through here only, and whatever the
    launcher starts below it gets the signal too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopped_by = 0
        """Number of the first signal, 0 while there is none."""
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int | None:
        """Run ``command`` to its end, what it prints appended to ``log``; its exit code, None once all are stopped."""
        with log.open("ab") as output:
            with self._lock:
                if self.stopped_by:
                    return None
                child = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
                self._running.add(child)
            try:
                code = child.wait()
                if self.stopped_by:
                    _wait_for_group(child.pid)
            finally:
                with self._lock:
                    self._running.discard(child)
        return code

    def _caught(self, number: int, frame: FrameType | None) -> None:
        # Runs in the main thread, which never holds the lock: it only waits for the threads that do.
        again = bool(self.stopped_by) and number == signal.SIGINT
        self.stopped_by = self.stopped_by or number
        with self._lock:
            for child in self._running:
                _send(child.pid, signal.SIGKILL if again else signal.SIGTERM)


def _send(group: int, number: int) -> bool:
    """Whether the group was still there."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for_group(group: int) -> None:
    """The launcher's outer process ends at once on SIGTERM; its ranks still write their checkpoint."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and _send(group, 0):
        time.sleep(0.1)
