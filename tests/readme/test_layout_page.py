"""The tables of ``docs/layout.md`` are those that the verb finds."""

from __future__ import annotations

from tests.readme.layout_page import PAGE, page_text


def test_the_plans_on_the_page_are_current():
    text = PAGE.read_text()
    assert text.count("<!-- plan of") == 3
    assert page_text(text) == text, "run python -m tests.readme.layout_page"
