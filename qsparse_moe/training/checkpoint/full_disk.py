"""One message where a run cannot write: the file, the reason and the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qsparse_moe.errors import CheckpointError


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file or folder that could not be written; the reason is the system's."""
    place = error.filename or path
    return CheckpointError(
        f"{place}: cannot be written ({error.strerror or error}); it needs a folder that this user may write and free "
        "space. Make room, or move the run and set training.output_dir"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's error inside into the one message about ``path``.

    Raises:
        CheckpointError: something inside could not be written.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
