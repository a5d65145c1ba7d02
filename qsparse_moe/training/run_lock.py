"""The lock of a run's folder, which a process holds from before it reads the folder until its engine is closed.

Two files beside the folder exclude a second run. On one machine it is a file under ``flock``, which is released when
its holder ends. Across machines, where the file system may not support such locks, it is a small record that names the
holder and has a heartbeat: a counter that grows every few seconds while the holder lives.

If several processes find no record, only one of them can create it. If several find a stale record, the last one to
replace it has the folder; each checks after a while whether its own record is still there. A holder that did not run
for half a minute and has lost the folder finds the other record before it writes again, and then writes nothing.
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
# A record without a heartbeat for so long is stale: network file systems show a change some seconds late.
_STALE_SECONDS = 30.0
# Wait between a take-over and its check, long enough for a simultaneous take-over or a late heartbeat to appear.
_SETTLE_SECONDS = 6.0
_POLL_SECONDS = 0.25


class RunFolderLock:
    """The lock of a run folder, which need not exist; the end of the ``with`` block releases it and removes its files.

    Only the rank that writes into the folder acquires it. Without a call of ``acquire``, ``check`` passes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._held = ExitStack()
        self._record: _Record | None = None

    def acquire(self) -> None:
        """Acquire the lock. If a process on another machine may hold it, this takes up to 36 s.

        Raises:
            CheckpointError: another process holds the lock and is named, or the parent folder cannot be written.
        """
        # flock first: it answers at once and covers all processes of this machine.
        with writing(self._folder.parent):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._held.enter_context(acquire_lock(self._folder.with_name(f".{self._folder.name}.lock")))
            except LockHeld as held:
                raise _refusal(self._folder, held.holder) from None
        self._record = _Record(self._folder)
        self._held.enter_context(self._record)

    def check(self) -> None:
        """Check that this process still holds the lock; call it before writing into the folder.

        Raises:
            CheckpointError: another process has taken the folder over and is named.
        """
        # flock cannot be lost while this process lives, so only the record is checked.
        holder = self._record.other_holder() if self._record is not None else None
        if holder is not None:
            raise CheckpointError(
                f"{self._folder}: was taken over by {holder}, because this process sent no heartbeat for "
                f"{_STALE_SECONDS:g} s (it was suspended, or the file system did not answer). This process ends and "
                "writes nothing more; the other one continues from the last checkpoint"
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
    """Boot identifier of the machine, since two machines may have the same name; empty if it has none."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class _Record:
    """The record of this process; inside the context its heartbeat is renewed."""

    def __init__(self, folder: Path) -> None:
        self._file = folder.with_name(f".{folder.name}.holder.json")
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        self._own = _Holder(socket.gethostname(), os.getpid(), now, boot=_boot())
        # A name of this process only, renamed over the record: readers must never find a half-written one.
        self._temporary = self._file.with_name(f"{self._file.name}.{self._own.host}-{self._own.pid}")
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="run-lock", daemon=True)

    def __enter__(self) -> None:
        with writing(self._file):
            while not self._create():
                first = self._wait_until_stale()
                # None if the record was removed because its holder ended; another process may then create it first.
                if first is not None and self._take_over(first):
                    break
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if (now := _read(self._file)) is not None and self._is_own(now):
                self._file.unlink()
            self._temporary.unlink()

    def other_holder(self) -> _Holder | None:
        """Return the process whose record has replaced this one's, or None."""
        now = _read(self._file)
        return None if now is None or self._is_own(now) else now

    def _create(self) -> bool:
        """Create the record if there is none and return whether this process did; only one process can."""
        try:
            descriptor = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self._text())
        return True

    def _wait_until_stale(self) -> bytes | None:
        """Return the bytes of a stale record, or None if the record is removed in the meantime."""
        text, first = _bytes(self._file), _read(self._file)
        if text is None or self._is_surely_dead(first):
            return text
        name = first or "another process"
        logger.info("%s: waiting %g s to find out whether %s still uses it", self._folder, _STALE_SECONDS, name)
        end = time.monotonic() + _STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now = _bytes(self._file)
            if now is None:
                return None
            if now != text:
                raise _refusal(self._folder, str(_read(self._file) or name))
        logger.warning("%s: %s sent no heartbeat for %g s; this run takes it over", self._folder, name, _STALE_SECONDS)
        return text

    def _is_surely_dead(self, holder: _Holder | None) -> bool:
        """Return whether the holder was a process on this machine that has ended."""
        if holder is None or (holder.host, holder.boot or self._own.boot) != (self._own.host, self._own.boot):
            return False
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # A process of another user has the number.
            return False
        # flock is held here already, so a record with this process's own number is from an earlier run of it.
        return holder.pid == self._own.pid

    def _take_over(self, seen: bytes) -> bool:
        """Replace a stale record and return True, or False if it has changed. Another machine may do the same."""
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
        return json.dumps(vars(self._own)) + "\n"

    def _write(self) -> None:
        self._temporary.write_text(self._text(), encoding="utf-8")
        self._temporary.replace(self._file)

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            self._own = replace(self._own, beat=self._own.beat + 1)
            # A full disk must not end the run here; the next checkpoint reports it.
            with suppress(OSError):
                if self.other_holder() is None:
                    self._write()

    def _is_own(self, holder: _Holder) -> bool:
        return replace(holder, beat=0) == replace(self._own, beat=0)


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
    """Return the holder in a record; None if there is no record or it cannot be parsed."""
    with suppress(OSError, ValueError, TypeError):
        return _Holder(**json.loads(file.read_text(encoding="utf-8")))
    return None


def _refusal(folder: Path, holder: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: is in use by {holder}; only one process at a time can use a run folder. Wait until it has ended, "
        "or end it, and then continue with training.resume=true, or give this run another training.name"
    )
