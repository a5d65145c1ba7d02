"""Assertions about an error message: its facts in order, not its wording."""

from __future__ import annotations

from collections.abc import Sequence


def assert_one_message(messages: Sequence[str], parts: Sequence[str]) -> None:
    """Assert that there is one message, which begins with the first part and contains the others in this order."""
    assert len(messages) == 1, messages
    (message,) = messages
    assert message.startswith(parts[0]), f"{message!r} does not begin with {parts[0]!r}"
    position = 0
    for part in parts:
        found = message.find(part, position)
        assert found >= 0, f"{part!r} is missing in {message[position:]!r}, the rest of {message!r}"
        position = found + len(part)
