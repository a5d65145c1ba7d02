"""Locks between processes that the operating system holds, so that one dies with the process that holds it.

A lock is a small file under ``flock``. The kernel releases it when its holder ends in any way, SIGKILL and power cut
included: the file that such a holder leaves behind means nothing, and the next holder takes it over. The file names its
holder, for the messages of those who wait or are refused. On NFS the same call locks across machines.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_FIRST_NOTICE_SECONDS = 2.0
_NOTICE_SECONDS = 60.0
# A file system without locks, such as Lustre mounted without -o flock or NFS without its lock service.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})


class LockHeld(Exception):
    """Another holder has the lock. Callers raise an error of their own that says what to do about it."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.path = path
        self.holder = holder
        """For a message: ``process 4711 on node3 since 2026-01-31 12:00:00 UTC``."""


class HeldLock:
    """A lock that this process holds until ``release``, until the ``with`` block ends or until the process does."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        _held.add(self)

    def release(self) -> None:
        """Remove the file and let the next one have the lock. Further calls do nothing."""
        descriptor = self._descriptor
        if descriptor is None:
            return
        # While it is still locked: whoever has opened this very file meanwhile finds out that it is gone.
        if _is_at(self.path, descriptor):
            with suppress(OSError):
                self.path.unlink()
        self._forget()

    def _forget(self) -> None:
        """Close the file without a word to the lock, which its other descriptors (a parent's) still hold."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire_lock(path: Path, *, timeout: float = 0.0, purpose: str = "") -> HeldLock:
    """Acquire the lock whose file is ``path``, in an existing folder that this user may write.

    Whoever has to wait says so after two seconds and then every minute. SIGINT and SIGTERM interrupt the wait as they
    interrupt any other Python code.

    Args:
        path: the lock's own file. It holds nothing else, and ``release`` removes it.
        timeout: seconds to wait for another holder; 0 does not wait.
        purpose: what is waited for, for the log: ``waiting for {purpose}: ...``.

    Raises:
        LockHeld: another process, or another thread or call in this one, still has it after ``timeout``.
        OSError: the file cannot be made.
    """
    start = time.monotonic()
    next_notice = start + _FIRST_NOTICE_SECONDS
    while True:
        lock = _try_to_acquire(path)
        if lock is not None:
            return lock
        now = time.monotonic()
        if now - start >= timeout:
            raise LockHeld(path, holder_of(path))
        if now >= next_notice:
            left = timeout - (now - start)
            logger.info("waiting for %s: %s has %s (at most %.0f s more)", purpose or "it", holder_of(path), path, left)
            next_notice = now + _NOTICE_SECONDS
        time.sleep(_POLL_SECONDS)


def holder_of(path: Path) -> str:
    """Name the process that wrote the lock's file last: its number, its machine and since when it has the lock."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    return text or "another process"


def _try_to_acquire(path: Path) -> HeldLock | None:
    """Acquire the lock if it is free. A file that its holder removes between the two calls is not the lock any more."""
    while True:
        # Python's descriptors are not passed on to programs that are started; see _forget_after_fork for the others.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _flock(path, descriptor)
            if taken and _is_at(path, descriptor):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{_this_process()}\n".encode())
                return HeldLock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not taken:
            return None


def _flock(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks (%s); nothing keeps a second process out", path, error)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


_held: set[HeldLock] = set()


def _forget_after_fork() -> None:
    """In a forked child: a descriptor of the parent's lock would keep it held after the parent's death."""
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_after_fork)
