"""Errors that a user can fix, each with one clear message.

A message names the setting or file, its value, the rule, and a way out. The command line prints it without a traceback
and exits with code 2. Mistakes of this package itself are ``assert``s, never one of these errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError raised inside: an error of writing, as on a full disk, has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class QSparseMoEError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(QSparseMoEError):
    """A setting is unknown, has the wrong type, or breaks a rule."""


class DataError(QSparseMoEError):
    """A data source, a file, or a column cannot be used."""


class BackendUnavailable(QSparseMoEError):
    """A backend, engine, or device requested by name cannot run on this machine."""


class CheckpointError(QSparseMoEError):
    """A checkpoint or a run folder cannot be used as requested."""


class RankLost(RuntimeError):
    """Another rank of the run is lost. The user's input is not at fault: exit code 1."""


class TrainingDiverged(RuntimeError):
    """A loss, an activation or a gradient is not finite. The user's input is not at fault: exit code 1."""
