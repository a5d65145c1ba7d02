"""Settings of earlier versions. A file that still contains one at its former default is read; imports no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from qsparse_moe.config.problems import Problem, show


class RemovedSetting(NamedTuple):
    """A setting that no longer exists."""

    default: Any
    """Its former default, which every config.yaml of an older run contains."""
    way_out: str
    """What to use instead."""


REMOVED = {
    "data.shuffle_buffer": RemovedSetting(
        0,
        "data.shuffle=true shuffles and is resumed exactly (sequences of a table; files of a stream, and sequences "
        "within data.shuffle_window)",
    ),
}
"""Every removed setting by its dotted path."""


def drop_removed(settings: dict[str, Any]) -> list[Problem]:
    """Delete every removed setting from ``settings`` and return a problem for each that was not at its default."""
    problems = []
    for path, removed in REMOVED.items():
        *sections, name = path.split(".")
        holder: Any = settings
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or name not in holder:
            continue
        value = holder.pop(name)
        # 0 == False in Python, but a file with ``false`` was never valid.
        if value != removed.default or type(value) is not type(removed.default):
            problems.append(removed_setting(path, show(value)))
    return problems


def removed_setting(path: str, value: str | None = None) -> Problem:
    """Return the problem of a removed setting, with its ``value`` where it is known."""
    given = f" ({value})" if value is not None else ""
    removed = REMOVED[path]
    return Problem(
        f"{path}{given} was removed: only its default, {show(removed.default)}, was ever valid; delete it, because "
        f"{removed.way_out}",
        (path,),
    )
