"""A lock for the operators that DeepSpeed compiles at first use, such as asynchronous I/O for NVMe offload.

DeepSpeed relies on PyTorch's lock, which is held as long as a file exists. A process that is killed while it compiles
leaves the file behind, and every later process waits for it without end and without a message.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch.utils import cpp_extension

from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels.native import extensions_folder
from qsparse_moe.locks import HeldLock, LockHeld, acquire_lock
from qsparse_moe.training.distributed.ranks import environment

logger = logging.getLogger(__name__)

# Fifteen times the four minutes of CPU time that asynchronous I/O takes: a build may share its cores.
_TIMEOUT_SECONDS = 3600.0


@contextmanager
def locked_builds() -> Iterator[None]:
    """Compile under a lock that ends with its holder, in a folder that only this package uses."""
    folder = extensions_folder() / "deepspeed"
    # In PyTorch's default folder, processes that do not use this lock could compile at the same time.
    with environment(TORCH_EXTENSIONS_DIR=str(folder)), mock.patch.object(cpp_extension, "FileBaton", BuildLock):
        yield


class BuildLock:
    """Replaces PyTorch's ``FileBaton``; it waits in ``try_acquire``, after which ninja skips what is built."""

    def __init__(self, lock_file_path: str, *others: Any, **more: Any) -> None:
        self._path = Path(lock_file_path)
        self._held: HeldLock | None = None

    def try_acquire(self) -> bool:
        """Acquire the lock and return True; ninja then builds only what is missing.

        Raises:
            BackendUnavailable: another process has held the lock for longer than any build takes.
        """
        folder = self._path.parent
        try:
            self._held = acquire_lock(self._path, timeout=_TIMEOUT_SECONDS, purpose=f"DeepSpeed's {folder.name}")
        except LockHeld as held:
            raise BackendUnavailable(
                f"training.deepspeed: {held.holder} has been compiling DeepSpeed's {folder.name} in {folder} for more "
                f"than {_TIMEOUT_SECONDS / 60:g} minutes; end that process if it hangs, or offload to cpu"
            ) from None
        if not any(folder.glob("*.so")):
            logger.info("compiling DeepSpeed's %s once for this machine, which takes minutes: %s", folder.name, folder)
        return True

    def release(self) -> None:
        """Release the lock."""
        assert self._held is not None, "PyTorch releases only a lock that it has acquired"
        self._held.release()
