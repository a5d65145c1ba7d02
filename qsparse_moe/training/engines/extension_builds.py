"""How the operators that DeepSpeed compiles at first use (asynchronous I/O, for NVMe offload) are locked.

DeepSpeed leaves it to PyTorch, whose lock is a file that exists: a process killed while it compiles leaves it behind,
and every later one waits for ever in silence.
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

# Its asynchronous I/O takes about four minutes of CPU time.
_TIMEOUT_SECONDS = 3600.0


@contextmanager
def locked_builds() -> Iterator[None]:
    """Let what is compiled meanwhile take a lock that dies with its holder, in a folder that is this package's own."""
    folder = extensions_folder() / "deepspeed"
    with environment(TORCH_EXTENSIONS_DIR=str(folder)), mock.patch.object(cpp_extension, "FileBaton", BuildLock):
        yield


class BuildLock:
    """What PyTorch calls a baton. It is waited for at once, so that whoever waited finds out whether it is built."""

    def __init__(self, lock_file_path: str, *others: Any, **more: Any) -> None:
        self._path = Path(lock_file_path)
        self._held: HeldLock | None = None

    def try_acquire(self) -> bool:
        """Return True when this process has the lock; ninja then builds what is not there.

        Raises:
            BackendUnavailable: another process has it for longer than any build takes.
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
            logger.info("compiling DeepSpeed's %s for this machine, once: %s (minutes)", folder.name, folder)
        return True

    def release(self) -> None:
        """Give the lock back."""
        assert self._held is not None, "PyTorch releases what it has acquired"
        self._held.release()
