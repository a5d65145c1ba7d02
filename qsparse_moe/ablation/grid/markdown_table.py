"""Markdown tables of the report of a grid."""

from __future__ import annotations

from collections.abc import Sequence


class MarkdownTable(str):
    """A Markdown table, which keeps its cells for other formats."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> MarkdownTable:
    """Return a table with this head; every row has one text per column. The Markdown has no ``caption``."""
    found = MarkdownTable("\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)))
    found.caption, found.head, found.rows = caption, head, rows
    return found
