"""Read a page of a report as a browser does not: every tag, every table, every image, every command."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "img"}


class ReadPage(HTMLParser):
    """The content of a page; an AssertionError if a tag is not closed or closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        """The rows of every table, its head first, by its caption."""
        self.images: dict[str, str] = {}
        """The address of every image by its text for readers who cannot see it."""
        self.commands: list[str] = []
        self.headings: list[str] = []
        self.paragraphs: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.identifiers: list[str] = []
        self._open: list[str] = []
        self._text = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given: dict[str, Any] = dict(attributes)
        assert len(given) == len(attributes), f"{tag} has an attribute twice"
        if "id" in given:
            self.identifiers.append(given["id"])
        if tag in ("a", "link"):
            self.links.append(given["href"])
        if tag == "img":
            assert given["alt"] not in self.images, f"two images are called {given['alt']!r}"
            self.images[given["alt"]] = given["src"]
        if tag == "th":
            assert given["scope"] in ("col", "row")
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td", "caption", "code", "h1", "h2", "p"):
            self._text = ""
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()
        if tag in ("th", "td"):
            self._rows[-1].append(self._text)
        if tag == "caption":
            self._caption = self._text
        if tag == "table":
            assert self._caption not in self.tables, f"two tables are called {self._caption!r}"
            self.tables[self._caption] = self._rows
        if tag == "code":
            self.commands.append(self._text)
        if tag in ("h1", "h2"):
            self.headings.append(self._text)
        if tag == "p":
            self.paragraphs.append(self._text)

    def handle_data(self, data: str) -> None:
        self._text += data

    def svg(self, alt: str) -> str:
        """Return the text of an image that is SVG."""
        kind, _, content = self.images[alt].partition(",")
        assert kind == "data:image/svg+xml;base64"
        return base64.b64decode(content).decode()


def read_page(text: str) -> ReadPage:
    """Return the content of a page that is well formed and needs nothing from anywhere else."""
    page = ReadPage(text)
    assert text.startswith("<!DOCTYPE html>") and page.tags[:2] == ["html", "head"]
    assert "script" not in page.tags and not re.search(r"\son\w+=", re.sub(r'"[^"]*"', '""', text))
    assert len(page.identifiers) == len(set(page.identifiers))
    targets = [link for link in page.links if link.startswith("#")]
    assert {target[1:] for target in targets} <= set(page.identifiers)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    for alt, source in page.images.items():
        assert alt and source.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,"))
        if source.startswith("data:image/svg"):
            drawn = page.svg(alt)
            # The names of the formats are no addresses that anything is loaded from.
            assert "<script" not in drawn and not re.search(r'(?:href|src)="(?!#|data:)', drawn)
            assert not re.search(r"url\((?!#)", drawn) and "@import" not in drawn
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    return page
