"""Apply settings from the command line, such as ``training.steps=50``, to the tree of the YAML file."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from types import NoneType
from typing import Any

from qsparse_moe.config.fields import (
    Node,
    child,
    item_node,
    run_schema,
    section_fields,
    takes_null,
    takes_text,
    unknown_setting,
    walk,
)
from qsparse_moe.config.problems import Problem, dotted, show
from qsparse_moe.config.yaml_text import parse_yaml, plain_scalar
from qsparse_moe.errors import ConfigError

# Longer indices are cut in messages, and never reach int(), which refuses more than 4300 digits.
_LONGEST_INDEX = 9


def apply_overrides(settings: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Write every ``path=value`` to ``settings`` in order, and return the problems of the invalid ones.

    The value is YAML. A mapping is merged into its section; a list replaces the list. An item of a list is
    addressed by its index: ``data.sources.0.max_bytes=1000``.
    """
    problems: list[Problem] = []
    for override in overrides:
        # At the first sign only, because the value may contain others.
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            problems.append(
                Problem(f"{show(override)} is not an override; write PATH=VALUE, such as training.steps=50")
            )
            continue
        # The reader of the files reads it, so that a value means the same in both places.
        value, duplicates = parse_yaml(text, f"the value of {path.strip()}")
        problems += duplicates
        parts = path.strip().split(".")
        problem = _write(settings, parts, _as_text(parts, value, text))
        problems += [problem] if problem else []
    return problems


def override_of(path: str, value: Any) -> str:
    """Return the override that sets ``path`` to ``value``; a text is in quotes only if YAML would read it as another.

    Paths of files need it: in ``/data/a #1`` YAML sees a comment, in ``/data/a: 1`` a key.
    """
    quoted = json.dumps(value, ensure_ascii=False)  # JSON is YAML on one line
    if not isinstance(value, str):
        return f"{path}={quoted}"
    try:
        read, _ = parse_yaml(value, path)
    except ConfigError:
        read = None
    return f"{path}={value if read == value else quoted}"


def _as_text(path: list[str], value: Any, text: str) -> Any:
    """Return ``value``, or the original text if the setting takes only text, for names such as 4711 and true.

    A shell removes the quotes that would make them text in a file.
    """
    known, node = walk(path)
    if len(known) < len(path) or not takes_text(node):
        return value
    is_null = value is None and (takes_null(node) or not text.strip())
    return value if is_null or not isinstance(value, (bool, int, float, NoneType)) else plain_scalar(text)


def _write(settings: dict[str, Any], path: list[str], value: Any) -> Problem | None:
    holder: Any = settings
    node: Node = run_schema()
    for depth, part in enumerate(path):
        following = child(node, part)
        if following is None:
            return unknown_setting(tuple(path[: depth + 1]))
        key: Any = part
        if isinstance(holder, list) and section_fields(node) is None:
            if len(part) > _LONGEST_INDEX or int(part) >= len(holder):
                return _no_such_item(path[:depth], part, len(holder))
            key = int(part)
        elif item_node(node) is not None:
            return _no_list(path[:depth], part, holder)
        elif not isinstance(holder, dict):
            return None  # the invalid value is reported by the validation
        if depth == len(path) - 1:
            holder[key] = _merged(holder[key] if isinstance(holder, list) else holder.get(key), value, following)
        else:
            holder = _opened(holder, key, following)
        node = following
    return None


def _opened(holder: Any, key: Any, node: Node) -> Any:
    """Return the section or list at ``key``, created from its default if the file does not contain it."""
    if isinstance(holder, list):
        return holder[key]
    # Null counts as absent: it is what YAML makes of a section with nothing below its name.
    if holder.get(key) is None:
        # A copy, because the schema is cached and its default must not change with this file.
        holder[key] = {} if section_fields(node) is not None else copy.deepcopy(node.get("default"))
    return holder[key]


def _merged(old: Any, new: Any, node: Node) -> Any:
    fields = section_fields(node)
    if fields is None or not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {name: _merged(old.get(name), value, fields.get(name, {})) for name, value in new.items()}


def _no_list(path: list[str], index: str, holder: Any) -> Problem:
    name = dotted(path)
    return Problem(
        f"{name}.{index} cannot be set: {name} ({show(holder)}) is not a list; write the whole list as {name}=[...]",
        (name,),
    )


def _no_such_item(path: list[str], index: str, length: int) -> Problem:
    index = index if len(index) <= _LONGEST_INDEX else f"{index[:_LONGEST_INDEX]}..."
    items = f"the last item is {length - 1}" if length else "it is empty"
    return Problem(f"{dotted([*path, index])} does not exist: {items}; write the whole list as {dotted(path)}=[...]")
