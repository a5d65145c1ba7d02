"""The lock of a run's folder, which one process holds from its first look at the folder until its engine is closed.

Two things keep a second run out, both beside the folder. On one machine a file under ``flock`` does, and dies with its
holder. Across machines, where the file system may not pass such locks on, a small record does: it names the holder, and
a number in it grows every few seconds for as long as the holder lives.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from qsparse_moe.errors import CheckpointError
from qsparse_moe.locks import LockHeld, acquire_lock
from qsparse_moe.training.checkpoint.full_disk import writing

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 2.0
# Of a record of another machine that does not change: file systems over a network show a change some seconds late.
_STALE_SECONDS = 30.0
_POLL_SECONDS = 0.25


@contextlib.contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which need not exist; nothing of it is left afterwards.

    Where the record of a process on another machine is found, this waits to see it change, up to 30 s.

    Raises:
        CheckpointError: another process has the folder, and is named; or its parent cannot be written.
    """
    folder = folder.absolute()
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = acquire_lock(folder.with_name(f".{folder.name}.lock"))
        except LockHeld as held:
            raise _refusal(folder, held.holder) from None
    with lock, _Record(folder):
        yield


@dataclass(frozen=True)
class _Holder:
    host: str
    pid: int
    since: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class _Record:
    """The record of this process, renewed while it is entered."""

    def __init__(self, folder: Path) -> None:
        self._file = folder.with_name(f".{folder.name}.holder.json")
        self._beside = self._file.with_name(f"{self._file.name}.new")
        self._folder = folder
        self._mine = _Holder(socket.gethostname(), os.getpid(), f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> None:
        self._wait_for_another_host()
        with writing(self._file):
            self._write()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_mine(_read(self._file)):
                self._file.unlink()
            self._beside.unlink()

    def _wait_for_another_host(self) -> None:
        """Return when the record is free: none, this machine's (whose flock is held now), or one that is dead."""
        first = _read(self._file)
        if first is None or first.host == self._mine.host:
            return
        logger.info("%s: looking for %g s whether %s still has it", self._folder, _STALE_SECONDS, first)
        end = time.monotonic() + _STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now = _read(self._file)
            if now is None:
                return
            if now != first:
                raise _refusal(self._folder, str(now))
        logger.warning("%s: %s gave no sign for %g s; this run takes it over", self._folder, first, _STALE_SECONDS)

    def _write(self) -> None:
        self._beside.write_text(json.dumps(vars(self._mine)) + "\n", encoding="utf-8")
        self._beside.replace(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            self._mine = replace(self._mine, beat=self._mine.beat + 1)
            # A full disk ends no run here: its next checkpoint says so.
            with suppress(OSError):
                self._write()

    def _is_mine(self, holder: _Holder | None) -> bool:
        return holder is not None and replace(holder, beat=0) == replace(self._mine, beat=0)


def _read(file: Path) -> _Holder | None:
    """Return the holder that a record names; None without one, or where it is no record."""
    with suppress(OSError, ValueError, TypeError):
        return _Holder(**json.loads(file.read_text(encoding="utf-8")))
    return None


def _refusal(folder: Path, holder: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: is in use by {holder}; one run folder belongs to one run at a time. Wait until it has ended, or "
        "end it, and then continue with training.resume=true, or give this run another training.name"
    )
