"""The parts of a page: text, tables, figures with their values, commands, and sections of these."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Drawing:
    """A figure with the values that it shows."""

    title: str
    """What the figure shows, for readers who cannot see it too."""
    figure: Figure
    values: Sequence[Table]
    """The values as tables, which the page folds away."""


@dataclass(frozen=True)
class Command:
    """A command to copy."""

    purpose: str
    arguments: Sequence[str]

    @property
    def line(self) -> str:
        """Return the command as a shell reads it, with every argument quoted that needs it."""
        return shlex.join(self.arguments)


@dataclass(frozen=True)
class Folded:
    """Parts that are shown when the reader asks for them."""

    title: str
    parts: Sequence[Part]
    is_open: bool = False
    """Whether they are shown at first."""


Part = str | Table | Drawing | Command | Folded
"""A paragraph, or one of the classes above."""


@dataclass(frozen=True)
class Section:
    """A heading and what follows it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values at the top, such as the run and the number of its steps."""
    sections: Sequence[Section]
