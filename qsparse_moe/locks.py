"""Locks between processes, held by the operating system, so that a lock ends with the process that holds it.

``acquire_lock`` is the lock itself; ``build_once`` uses it to create a file or a folder that several processes need.

A lock is a small file under ``flock``. The kernel releases it when its holder ends in any way, SIGKILL and power cut
included: the file that such a holder leaves behind has no effect, and the next holder reuses it. The file names its
holder, for the messages of processes that wait or are refused. On NFS the same call locks across machines.
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

# Polled, because a blocking flock has no timeout and would not log who holds the lock.
_POLL_SECONDS = 0.1
_FIRST_NOTICE_SECONDS = 2.0
_NOTICE_SECONDS = 60.0
# A file system without locks, such as Lustre mounted without -o flock or NFS without its lock service.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
# A process on another machine cannot be checked, so its folder is removed after a time longer than any build.
_ABANDONED_SECONDS = 7 * 86400.0


class LockHeld(Exception):
    """Another holder has the lock. Callers raise an error of their own with a way out."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.path = path
        self.holder = holder
        """Text for a message: ``process 4711 on node3 since 2026-01-31 12:00:00 UTC``."""


class HeldLock:
    """A lock that this process holds until ``release``, the end of the ``with`` block, or the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        _held.add(self)

    def release(self) -> None:
        """Remove the file and release the lock. Further calls do nothing."""
        descriptor = self._descriptor
        if descriptor is None:
            return
        # Removed while still locked: a process that has opened this file meanwhile notices that it is gone.
        if _is_at(self.path, descriptor):
            with suppress(OSError):
                self.path.unlink()
        self._forget()

    def _forget(self) -> None:
        """Close the descriptor without unlocking: the parent's descriptor still holds the lock."""
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

    A process that waits logs it after two seconds and then every minute. SIGINT and SIGTERM interrupt the wait as they
    interrupt any other Python code.

    Args:
        path: file of the lock alone; ``release`` removes it.
        timeout: seconds to wait for another holder; 0: do not wait.
        purpose: description of the purpose for the log: ``waiting for {purpose}, held by ...``.

    Raises:
        LockHeld: another process, or another thread or call in this one, still has it after ``timeout``.
        OSError: the file cannot be created.
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
    """Create ``path``, a file or a folder, unless it exists: the first process builds it while the others wait.

    No lock is taken if it exists. ``build`` gets an empty folder beside ``path`` and returns the file or folder in it
    (or the folder itself) that is renamed to ``path`` once it is on the disk, so that readers see all or nothing. A
    process that dies during the build leaves its folder behind, which the next build removes.

    Args:
        path: the file or folder to create; it is never changed afterwards.
        build: fills its folder and returns what to rename.
        timeout: seconds to wait for another process that builds.
        purpose: description of what is built, for the log.

    Raises:
        LockHeld: another process still builds after ``timeout``.
        OSError: ``path`` cannot be written.
    """
    # Before the lock, so that a finished cache can be used from a folder that this user may not write.
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with acquire_lock(path.with_name(f"{path.name}.lock"), timeout=timeout, purpose=purpose):
        if path.exists():
            return
        with folder_beside(path) as folder:
            built = build(folder)
            # Before the rename: after a power cut a file system may have the new name without the contents.
            for part in (built, *built.rglob("*")):
                flush(part)
            try:
                built.rename(path)
            except OSError:
                # On a file system without locks, another process may have been faster.
                if not path.is_dir():
                    raise
        flush(path.parent)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Create an empty folder in which to build ``path``; remove it afterwards, and those of processes that died."""
    prefix = f"{path.name}.partial-"
    for leftover in path.parent.glob(f"{prefix}*"):
        if _is_abandoned(leftover, leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)
    # Host and process are part of the name, so that a later build can decide whether this one is still alive.
    folder = path.with_name(f"{prefix}{os.getpid()}-{socket.gethostname()}-{time.time_ns()}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path, maker: str) -> bool:
    """Return whether the process that created the folder is gone. The lock alone proves it only where locks work."""
    process, _, place = maker.partition("-")
    if process.isdecimal() and place.rpartition("-")[0] == socket.gethostname():
        # Signal 0 is not delivered; it only tests whether the process exists.
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # the process exists and belongs to another user
            return False
        return False
    with suppress(FileNotFoundError):
        return time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS
    return False


def flush(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk, so that a power cut after the rename loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holder_of(path: Path) -> str:
    """Return the process that wrote the lock's file last: its id, its machine, and since when it holds the lock."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    return text or "another process"


def _try_to_acquire(path: Path) -> HeldLock | None:
    """Acquire the lock if it is free. A file that its holder removes between open and flock is no longer the lock."""
    while True:
        # Python's descriptors are not inherited by new programs; for forked children see _forget_after_fork.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _flock(path, descriptor)
            if taken and _is_at(path, descriptor):
                # A file that an earlier holder left behind still names that holder.
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
        # Not an error: a build is renamed into place as a whole, and a run folder has a record beside its lock for
        # this.
        logger.warning("%s: this file system has no locks (%s); a second process is not prevented", path, error)
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
    """Close the parent's locks in a forked child: its descriptors would keep them held after the parent's death."""
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_after_fork)
