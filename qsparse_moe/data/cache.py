"""A folder of the data cache: built once, by whichever process comes first, and either complete or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qsparse_moe import locks
from qsparse_moe.errors import DataError

# Tokenising a large corpus takes hours, and the lock of a process that dies is released at once, so a longer wait means
# that the other process hangs.
_TIMEOUT_SECONDS = 12 * 3600.0


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Build ``folder`` by one call of ``build`` unless it exists.

    ``build(partial)`` fills another folder beside it, which is renamed once it is on the disk. Other processes
    wait meanwhile and log it; see ``locks.build_once``.

    Raises:
        DataError: the folder's place cannot be written, or another process builds it for too long.
    """

    def fill(partial: Path) -> Path:
        build(partial)
        return partial

    try:
        locks.build_once(folder, fill, timeout=_TIMEOUT_SECONDS, purpose=f"the tokens in {folder}")
    except locks.LockHeld as held:
        raise DataError(
            f"data.cache_dir: {folder} is being built by {held.holder}, for which this process has waited "
            f"{_TIMEOUT_SECONDS / 3600:g} hours; end that process if it hangs, or set data.cache_dir to another folder"
        ) from None
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {folder.parent} cannot be written ({error}); it must be a folder with free space that "
            "this user may write; set data.cache_dir to one"
        ) from error
