"""Errors that a user can fix, each with one clear message.

A message names the setting or file, its value, the rule, and a way out. The command line prints it without a traceback
and exits with code 2. Mistakes of this package itself are ``assert``s, never one of these errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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


class ArgumentError(ConfigError):
    """An argument of a function breaks a rule. The command line names it by the option that was typed.

    Args:
        template: the message with a field per argument, such as ``"{top_p} (0) must lie in (0, 1]"``; ``{prompts[2]}``
            is an element. Values in it need ``without_fields`` if they can contain braces. ``str`` shows the names of
            the arguments.
    """

    def __init__(self, template: str) -> None:
        super().__init__(template.format_map(_ArgumentNames({})))
        self.template = template

    def naming(self, names: Mapping[str, object]) -> ConfigError:
        """Return the error with other names for the arguments in ``names``."""
        return ConfigError(self.template.format_map(_ArgumentNames(names)))


def without_fields(value: object) -> str:
    """Return the text of a value for the template of an ``ArgumentError``, with its braces escaped."""
    return str(value).replace("{", "{{").replace("}", "}}")


class _ArgumentNames(dict[str, object]):
    def __missing__(self, name: str) -> object:
        return _ArgumentName(name)


# str.format_map looks up "prompts" for the field {prompts[2]} and indexes the result, so a name must be able to be
# indexed.
class _ArgumentName(str):
    def __getitem__(self, index: object) -> str:
        return f"{self}[{index}]"


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
