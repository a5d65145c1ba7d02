"""The lock of a run's folder, which one process holds from its first look at the folder until its engine is closed.

Two things keep a second run out, both beside the folder. On one machine a file under ``flock`` does, and dies with its
holder. Across machines, where the file system may not pass such locks on, a small record does: it names the holder, and
a number in it grows every few seconds for as long as the holder lives.

Of several processes that find no record one creates it. Of several that find a dead one, the last to replace it has the
folder: each looks again after a while whether its own is still there. A holder that did not run for half a minute, and
has lost the folder so, finds another's record before it writes the next time, and writes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from qsparse_moe.errors import CheckpointError
from qsparse_moe.locks import LockHeld, acquire_lock
from qsparse_moe.training.checkpoint.full_disk import writing

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 2.0
# Of a record of another machine that does not change: file systems over a network show a change some seconds late.
_STALE_SECONDS = 30.0
# From a take-over to the second look: for another one that was decided upon at the same time, and for a holder's beat.
_SETTLE_SECONDS = 6.0
_POLL_SECONDS = 0.25


class RunFolderLock:
    """The lock of a run folder, which need not exist; leaving the ``with`` block releases it and leaves nothing of it.

    Only the rank that writes into the folder takes it. Where nobody has, the checks pass.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._held = ExitStack()
        self._record: _Record | None = None

    def take(self) -> None:
        """Take the lock; where a process on another machine may have it, that is found out in up to 36 s.

        Raises:
            CheckpointError: another process has the folder, and is named; or its parent cannot be written.
        """
        with writing(self._folder.parent):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(acquire_lock(self._folder.with_name(f".{self._folder.name}.lock")))
            except LockHeld as held:
                raise _refusal(self._folder, held.holder) from None
        self._record = _Record(self._folder)
        self._held.enter_context(self._record)

    def check(self) -> None:
        """Make sure that the folder is still this process's, before something is written into it.

        Raises:
            CheckpointError: another process has taken it over, and is named.
        """
        holder = self._record.other_holder() if self._record is not None else None
        if holder is not None:
            raise CheckpointError(
                f"{self._folder}: was taken over by {holder}, because this process gave no sign of life for "
                f"{_STALE_SECONDS:g} s (it was suspended, or the file system did not answer). This process ends and "
                "writes nothing more; the other one goes on from the last checkpoint"
            )

    def __enter__(self) -> RunFolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()


@dataclass(frozen=True)
class _Holder:
    host: str
    pid: int
    since: str
    beat: int = 0
    boot: str = ""
    """Of the machine's kernel, since two machines may have one name; empty where it has none."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class _Record:
    """The record of this process, renewed while it is entered."""

    def __init__(self, folder: Path) -> None:
        self._file = folder.with_name(f".{folder.name}.holder.json")
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        self._mine = _Holder(socket.gethostname(), os.getpid(), now, boot=_boot())
        self._beside = self._file.with_name(f"{self._file.name}.{self._mine.host}-{self._mine.pid}")
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> None:
        with writing(self._file):
            while not self._create():
                first = self._wait_until_dead()
                # Gone meanwhile: its holder has ended, and another process may be faster than this one again.
                if first is not None and self._take_over(first):
                    break
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if (now := _read(self._file)) is not None and self._is_mine(now):
                self._file.unlink()
            self._beside.unlink()

    def other_holder(self) -> _Holder | None:
        """Return the process whose record has taken the place of this one's; None as long as there is none."""
        now = _read(self._file)
        return None if now is None or self._is_mine(now) else now

    def _create(self) -> bool:
        """Write the record where there is none; only one process can."""
        try:
            descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self._text())
        return True

    def _wait_until_dead(self) -> bytes | None:
        """Return the bytes of a record whose holder is dead, or None where the record goes meanwhile."""
        text, first = _bytes(self._file), _read(self._file)
        if text is None or self._is_surely_dead(first):
            return text
        said = first or "another process"
        logger.info("%s: looking for %g s whether %s still has it", self._folder, _STALE_SECONDS, said)
        end = time.monotonic() + _STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now = _bytes(self._file)
            if now is None:
                return None
            if now != text:
                raise _refusal(self._folder, str(_read(self._file) or said))
        logger.warning("%s: %s gave no sign for %g s; this run takes it over", self._folder, said, _STALE_SECONDS)
        return text

    def _is_surely_dead(self, holder: _Holder | None) -> bool:
        """Whether it was a process of this machine, which has ended."""
        if holder is None or (holder.host, holder.boot or self._mine.boot) != (self._mine.host, self._mine.boot):
            return False
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        # This very process had it before.
        return holder.pid == self._mine.pid

    def _take_over(self, seen: bytes) -> bool:
        """Replace a dead record; false where it has changed by now. A process on another machine may do the same."""
        if _bytes(self._file) != seen:
            return False
        was = _read(self._file)
        self._write()
        if not self._is_surely_dead(was):
            time.sleep(_SETTLE_SECONDS)
        if (holder := self.other_holder()) is not None:
            raise _refusal(self._folder, str(holder))
        return True

    def _text(self) -> str:
        return json.dumps(vars(self._mine)) + "\n"

    def _write(self) -> None:
        self._beside.write_text(self._text(), encoding="utf-8")
        self._beside.replace(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            self._mine = replace(self._mine, beat=self._mine.beat + 1)
            # A full disk ends no run here: its next checkpoint says so.
            with suppress(OSError):
                if self.other_holder() is None:
                    self._write()

    def _is_mine(self, holder: _Holder) -> bool:
        return replace(holder, beat=0) == replace(self._mine, beat=0)


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


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
