"""Resolve a selector of layers or experts, such as ``3``, ``[0, 2]``, or ``"0-3"``. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def select(selector: int | str | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Return the indices below ``count`` that ``selector`` names; ``None`` names all, ``"a-b"`` includes both ends.

    Raises:
        ValueError: the text is not an index or range, or an index is outside ``[0, count)``.
    """
    if selector is None:
        return tuple(range(count))
    indices = _parse(selector) if isinstance(selector, str) else [selector] if isinstance(selector, int) else selector
    if not indices:
        raise ValueError(f"names nothing; the valid indices are 0-{count - 1}")
    # A range is judged by its ends, so that "0-99999999999" costs nothing.
    ends = (indices[0], indices[-1]) if isinstance(indices, range) else (min(indices), max(indices))
    outside = [index for index in ends if not 0 <= index < count]
    if outside:
        raise ValueError(f"names {outside[-1]}; the valid indices are 0-{count - 1}")
    return tuple(indices)


def _parse(text: str) -> Sequence[int]:
    first, dash, last = text.partition("-")
    try:
        # The ends have not been checked yet and may be billions apart, which costs a range nothing.
        return range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise ValueError('is neither an index such as 2 nor a range such as "0-3"') from None
