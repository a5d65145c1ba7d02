"""A folder that is built once, by whichever process comes first, and is either complete or absent."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qsparse_moe.errors import DataError

logger = logging.getLogger(__name__)


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """After the call ``folder`` exists and is what one call of ``build`` made.

    ``build(partial)`` fills another folder beside it, which is renamed when all of it is on the disk. A process that
    dies on the way leaves only that one behind, and the next one removes it. Processes that come meanwhile wait.

    Raises:
        DataError: the folder's place cannot be written.
    """
    if folder.exists():
        return
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that builds %s", folder)
            lock.acquire()
        try:
            if not folder.exists():
                _build(folder, build)
        finally:
            lock.release()
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {folder.parent} cannot be written ({error}); it must be a folder with free space that "
            "this user may write; set data.cache_dir to one"
        ) from error


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    # Nobody else is at work while the lock is held: these are of processes that died.
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        build(partial)
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """Put a file or a folder's entries on the disk, so that a power cut after the rename loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
