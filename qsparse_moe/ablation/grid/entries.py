"""Names and labels of the entries of a grid: its variants and the settings of its axes. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from qsparse_moe.config.labels import LETTERS, OVERRIDES, name_of, setting_label

# Names become parts of training.name, which has the same pattern.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""The pattern of the names of variants and of settings of axes."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Settings = dict[str, Any] | None


class Choice(NamedTuple):
    """The entry that a point takes from the variants or from one axis."""

    label: str
    """The label for legends: the name in the file, or else the settings in words."""
    paths: tuple[str, ...]
    """The settings that any entry of the same axis sets."""


def choices(
    settings_by_name: Mapping[str, Settings], path: str | None = None
) -> list[tuple[str, dict[str, Any], Choice]]:
    """Return name, settings, and choice of each entry; the labels of an axis of values (``path``) show the values."""
    paths = tuple(dict.fromkeys(other for settings in settings_by_name.values() for other in settings or {}))
    every = [settings or {} for settings in settings_by_name.values()]
    found = []
    for name, settings in zip(settings_by_name, every, strict=True):
        words = setting_label(path, settings[path]) if path is not None else _own_label(settings, every)
        # Without an explicit name, the words are clearer than the name that was derived from them.
        is_made_of_words = path is not None or name == name_of(words)
        found.append((name, settings, Choice(words if is_made_of_words else name, paths)))
    return found


def by_name(entries: list[Any]) -> dict[str, Settings]:
    """Return a list of variants by name; an entry without a name is named after the settings that distinguish it."""
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("each entry must be a mapping of settings by dotted path, with an optional name")
    every = [{path: value for path, value in entry.items() if path != "name"} for entry in entries]
    found: dict[str, Settings] = {}
    for entry, settings in zip(entries, every, strict=True):
        name = entry.get("name") or name_of(_own_label(settings, every)) or "base"
        if name in found:
            raise ValueError(f"two variants are named {name}; rename one of them")
        found[name] = settings
    return found


def _own_label(settings: Mapping[str, Any], every: list[dict[str, Any]]) -> str:
    """Return the settings in words, without the settings and overrides that every variant has."""
    words = []
    for path, value in settings.items():
        if len(every) > 1 and all(path in other and other[path] == value for other in every):
            continue
        # Overrides are lists of settings; JSON of them would make an unreadable name.
        if path == OVERRIDES and isinstance(value, list):
            lists = [other[path] for other in every if isinstance(other.get(path), list)]
            value = [one for one in value if len(lists) < len(every) or not all(one in other for other in lists)]
        words.append(setting_label(path, value))
    return "; ".join(words)


def named(path: str, axis: list[Any] | Mapping[str, Settings]) -> Mapping[str, Settings]:
    """Return the settings of an axis by name; a value is named by the letter or last part of its path and itself."""
    if not isinstance(axis, list):
        return axis
    return {value_name(path, value): {path: value} for value in axis}


def value_name(path: str, value: Any) -> str:
    """Return the name of a value of an axis: its letter or the last part of ``path``, and the value."""
    if path == OVERRIDES and isinstance(value, list):
        return name_of(setting_label(path, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{LETTERS[path]}{text}" if path in LETTERS else f"{path.rpartition('.')[2]}-{text}"
