"""Locks between processes that the operating system holds, so that one dies with the process that holds it.

``acquire_lock`` is the lock itself; ``build_once`` makes a file or a folder under one, for all processes that need it.

A lock is a small file under ``flock``. The kernel releases it when its holder ends in any way, SIGKILL and power cut
included: the file that such a holder leaves behind means nothing, and the next holder takes it over. The file names its
holder, for the messages of those who wait or are refused. On NFS the same call locks across machines.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_FIRST_NOTICE_SECONDS = 2.0
_NOTICE_SECONDS = 60.0
# A file system without locks, such as Lustre mounted without -o flock or NFS without its lock service.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
# Nobody can ask another machine whether a process of it is alive; no build takes so long.
_ABANDONED_SECONDS = 7 * 86400.0


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
        purpose: what is waited for, for the log: ``waiting for {purpose}, held by ...``.

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
            left = timedelta(seconds=round(timeout - (now - start)))
            logger.info("waiting for %s, held by %s (at most %s more)", purpose or path, holder_of(path), left)
            next_notice = now + _NOTICE_SECONDS
        time.sleep(_POLL_SECONDS)


def build_once(path: Path, build: Callable[[Path], Path], *, timeout: float, purpose: str) -> None:
    """Return when ``path``, a file or a folder, is there; the process that comes first builds it, the others wait.

    Nothing is locked where it is there already. ``build`` is given an empty folder beside ``path`` and returns what in
    it, or the folder itself, is renamed to ``path`` once it is on the disk: whoever looks sees all of it or nothing. A
    process that dies on the way leaves its folder behind, which the next one that builds removes.

    Args:
        path: what shall be there; it is never changed afterwards.
        build: fills the folder that it is given.
        timeout: seconds to wait for another process that builds.
        purpose: what is built, for the log.

    Raises:
        LockHeld: another process still builds after ``timeout``.
        OSError: the place cannot be written.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with acquire_lock(path.with_name(f"{path.name}.lock"), timeout=timeout, purpose=purpose):
        if path.exists():
            return
        with _folder_beside(path) as folder:
            built = build(folder)
            for part in (built, *built.rglob("*")):
                flush(part)
            try:
                built.rename(path)
            except OSError:
                # Where the file system has no locks, another process may have been faster.
                if not path.is_dir():
                    raise
        flush(path.parent)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """Make an empty folder for what shall become ``path``; it goes afterwards, like those of processes that died."""
    prefix = f"{path.name}.partial-"
    for leftover in path.parent.glob(f"{prefix}*"):
        if _is_abandoned(leftover, leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = path.with_name(f"{prefix}{os.getpid()}-{socket.gethostname()}-{time.time_ns()}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path, maker: str) -> bool:
    """Whether the process that made the folder is gone. Holding the lock says so only where locks work."""
    process, _, place = maker.partition("-")
    if process.isdecimal() and place.rpartition("-")[0] == socket.gethostname():
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    with suppress(FileNotFoundError):
        return time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS
    return False


def flush(path: Path) -> None:
    """Put a file or a folder's entries on the disk, so that a power cut after the rename loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
