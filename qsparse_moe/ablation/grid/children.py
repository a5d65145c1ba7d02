"""Run several processes that end together: the first signal lets each save a checkpoint, a second Ctrl-C kills them."""

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

# The DeepSpeed launcher (0.19.8) kills a rank 30 s after its SIGTERM; 45 s leave time for that.
_PATIENCE_SECONDS = 45.0


class Children(CaughtSignals):
    """A context in which SIGINT, SIGTERM, and SIGUSR1 are passed to the children as SIGTERM and no new child starts.

    Each child leads its own session, so that a Ctrl-C in the terminal reaches it only through this class, and so that
    a signal to its process group also reaches the ranks that a launcher started.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopped_by = 0
        """Number of the first signal, 0 before any signal."""
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int | None:
        """Run ``command`` to its end and append its output to ``log``.

        Return the exit code, or None if a signal came before the start.
        """
        with log.open("ab") as output:
            # Under the lock, so that a signal cannot come between the check and the registration of the child.
            with self._lock:
                if self.stopped_by:
                    return None
                # start_new_session also makes the child the leader of a process group, which _send addresses.
                child = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
                self._running.add(child)
            try:
                code = child.wait()
                if self.stopped_by:
                    # Otherwise the grid could return while ranks still write their checkpoint.
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
    """Send a signal to a process group; return whether the group still existed. Signal 0 only asks."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _wait_for_group(group: int) -> None:
    """Wait for the ranks: the outer process of the launcher ends at once on SIGTERM while they save a checkpoint."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end and _send(group, 0):
        time.sleep(0.1)
