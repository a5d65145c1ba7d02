"""The error for a run that cannot write a file: it names the file, the reason, and the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qsparse_moe.errors import CheckpointError


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file or folder that could not be written; the reason is the system's."""
    # The system names the file if it knows it, which is more precise than the folder that the caller passes.
    file = error.filename or path
    return CheckpointError(
        f"{file}: cannot be written ({error.strerror or error}); it requires a folder that this user may write to and "
        "free disk space. Free some space, or move the run and set training.output_dir"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an ``OSError`` inside the block into the error of ``cannot_write``.

    Raises:
        CheckpointError: a file could not be written inside the block.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
