"""The situations of a user that this package reports with one clear message.

Each message names the setting or file, its value, the rule and the way out. The command line prints it without a
traceback and ends with code 2. Our own mistakes are ``assert``s, never one of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the system's error inside the name of the file: one that comes of writing, as on a full disk, has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class QSparseMoEError(Exception):
    """Base of every error that the user can mend."""


class ConfigError(QSparseMoEError):
    """A setting is unknown, has the wrong type or breaks a rule."""


class DataError(QSparseMoEError):
    """A data source, a file or a column cannot be used."""


class BackendUnavailable(QSparseMoEError):
    """A backend, engine or device asked for by name cannot run here."""


class CheckpointError(QSparseMoEError):
    """A checkpoint or a run folder cannot be used as asked."""


class RankLost(RuntimeError):
    """Another rank of the run is gone. The user's input is not wrong in itself: exit code 1."""


class TrainingDiverged(RuntimeError):
    """A loss, an activation or a gradient is not finite. The user's input is not wrong in itself: exit code 1."""
