"""Every file that the README and the pages of the documentation name exists, and every anchor that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.readme.blocks import README, REPOSITORY

PAGES = sorted(path for path in REPOSITORY.glob("*.md")) + sorted((REPOSITORY / "docs").glob("*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs form them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page):
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}, and {target.name} has no such heading"


def test_every_path_that_the_readme_names_exists():
    named = set(re.findall(r"`((?:qsparse_moe|configs|launch|docs|tests|examples)/[\w./-]*)`", README))
    assert len(named) >= 3
    assert not {path for path in named if not (REPOSITORY / path).exists()}


def test_readme_is_short():
    assert len(README.split()) <= 1500
