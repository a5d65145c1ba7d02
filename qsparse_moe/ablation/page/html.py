"""Write a page as one HTML file that needs nothing else: no script, no font, no address of another file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from qsparse_moe.ablation.page.images import image_address
from qsparse_moe.ablation.page.parts import Command, Drawing, Folded, Page, Part, Section, Table
from qsparse_moe.ablation.page.style import STYLE
from qsparse_moe.runs.folder import write_atomically

PAGE = "report.html"
"""Name of the file in the folder of a report."""


def write_page(page: Page, file: Path) -> None:
    """Write the page to ``file``, which is never half written."""
    write_atomically(file, html_of(page))


def html_of(page: Page) -> str:
    """Return the page as HTML. Every text is escaped, and the order and the markup depend on ``page`` alone."""
    identifiers = _identifiers(page.sections)
    links = "".join(
        f'<li><a href="#{identifier}">{escape(section.title)}</a></li>'
        for identifier, section in zip(identifiers, page.sections, strict=True)
    )
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Without an icon of its own, a page that is served makes the browser ask the server for one.
        '<link rel="icon" href="data:,">',
        f"<title>{escape(page.title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{escape(page.title)}</h1><dl>{facts}</dl></header>",
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        "<main>",
        *(_section(one, identifier) for one, identifier in zip(page.sections, identifiers, strict=True)),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _identifiers(sections: Sequence[Section]) -> list[str]:
    # The number keeps two titles apart that have the same letters.
    words = [re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") for section in sections]
    return [f"{number}-{word}" for number, word in enumerate(words, 1)]


def _section(section: Section, identifier: str) -> str:
    return (
        f'<section id="{identifier}" aria-labelledby="{identifier}-title">\n'
        f'<h2 id="{identifier}-title">{escape(section.title)}</h2>\n{_parts(section.parts)}\n</section>'
    )


def _parts(parts: Iterable[Part]) -> str:
    return "\n".join(map(_part, parts))


def _part(part: Part) -> str:
    match part:
        case str():
            return f"<p>{escape(part)}</p>"
        case Table():
            return _table(part)
        case Drawing():
            return _drawing(part)
        case Command():
            code = f"<pre><code>{escape(part.line)}</code></pre>"
            return f'<div class="command"><p>{escape(part.purpose)}</p>{code}</div>'
        case Folded():
            shown = " open" if part.is_open else ""
            return f"<details{shown}><summary>{escape(part.title)}</summary>\n{_parts(part.parts)}\n</details>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = "\n".join(_row(row) for row in table.rows)
    name = escape(table.caption)
    # Only the table scrolls on a narrow screen, and not the page; by keyboard too, hence the focus.
    return (
        f'<div class="wide" role="region" aria-label="{name}" tabindex="0"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(row: Sequence[str]) -> str:
    first, *others = row
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
    return f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'


def _drawing(drawing: Drawing) -> str:
    title = escape(drawing.title)
    image = f'<img src="{image_address(drawing.figure)}" alt="{title}">'
    folded = f"<details><summary>Values of this figure</summary>\n{_parts(drawing.values)}\n</details>"
    return (
        f'<figure><div class="wide" tabindex="0" role="region" aria-label="{title}">{image}</div>'
        f"<figcaption>{title}</figcaption>\n{folded if drawing.values else ''}\n</figure>"
    )
