"""The settings as a tree of names: which settings exist, their valid values, and the nearest name.

Everything is read from the JSON schema, so that errors, the table of settings, and the editor's help agree.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from qsparse_moe.config.problems import Problem, dotted, show
from qsparse_moe.config.removed import REMOVED, removed_setting
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.section import SMALLEST_GUARD

Node = dict[str, Any]
Path = tuple[str | int, ...]

# Messages describe a regular expression in words; a test checks that every pattern of the schema is listed here.
PATTERN_WORDS = {
    "^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits, '.', '_' and '-', beginning with a letter or digit",
}
# YAML 1.1 reads these words as booleans, and the reader of run files as text (yaml_text.py).
_BOOLEAN_WORDS = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}


# Cached, because pydantic takes milliseconds to build it and every message needs it.
@cache
def run_schema() -> Node:
    """Return the JSON schema of a run file."""
    return RunConfig.model_json_schema()


def resolve(node: Node) -> Node:
    """Return ``node``, or the section that it refers to."""
    # pydantic describes a nested section once, below $defs, and refers to it where it is used.
    reference = node.get("$ref")
    sections: dict[str, Node] = run_schema()["$defs"]
    return sections[reference.rsplit("/", 1)[1]] if reference else node


def section_fields(node: Node) -> dict[str, Node] | None:
    """Return the settings of a section by name; None if ``node`` is not a section."""
    fields: dict[str, Node] | None = resolve(node).get("properties")
    return fields


def item_node(node: Node) -> Node | None:
    """Return the schema of the items of a list; None if ``node`` is not a list."""
    # A list that may be null, or text as well, is a union in the schema.
    for option in node.get("anyOf", [node]):
        if option.get("type") == "array":
            items: Node = option["items"]
            return items
    return None


def child(node: Node, part: str | int) -> Node | None:
    """Return the setting ``part`` of a section, or the item of a list at this index; None if it does not exist."""
    fields = section_fields(node)
    if fields is not None:
        return fields.get(str(part))
    # An index is compared as text, because the parts of a path from the command line are text.
    return item_node(node) if str(part).isdecimal() else None


def takes_text(node: Node) -> bool:
    """Return whether a setting takes any text, but no numbers and no booleans, so that 4711 can only be a name."""
    options = node.get("anyOf", [node])
    # A choice among given words is no free text, although its type is string.
    types = {option.get("type") for option in options if "enum" not in option}
    return "string" in types and not types & {"integer", "number", "boolean"}


def takes_null(node: Node) -> bool:
    """Return whether a setting may be null."""
    return any(option.get("type") == "null" for option in node.get("anyOf", [node]))


def walk(path: Sequence[str | int]) -> tuple[Path, Node]:
    """Follow ``path`` as far as it exists; return this part of it and its schema."""
    node: Node = run_schema()
    for depth, part in enumerate(path):
        following = child(node, part)
        if following is None:
            return tuple(path[:depth]), node
        node = following
    return tuple(path), node


def value_of(config: RunConfig, path: str) -> Any:
    """Return the value of a setting by its dotted path, in the form that a run file has."""
    value: Any = config.model_dump(mode="json")
    for part in path.split("."):
        value = value[part]
    return value


def all_settings() -> Iterator[tuple[str, Node]]:
    """Yield the dotted path and the schema of every setting; ``N`` is the index of a list item."""
    yield from _settings_below((), run_schema())


def _settings_below(path: Path, node: Node) -> Iterator[tuple[str, Node]]:
    for name, field in (section_fields(node) or {}).items():
        here = (*path, name)
        if section_fields(field) is not None:
            yield from _settings_below(here, field)
            continue
        yield dotted(here), field
        item = item_node(field)
        if item is not None:
            yield from _settings_below((*here, "N"), item)


def takes(node: Node, *, guards: bool = False) -> str:
    """Return the valid values of a setting in words: ``a whole number of at least 1 or null``.

    Upper limits that only guard the arithmetic of the rules are included only with ``guards``.
    """
    if "anyOf" in node:
        return " or ".join(takes(option, guards=guards) for option in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(str(choice) for choice in node["enum"])
    if section_fields(node) is not None:
        return "a section (settings by name)"
    if node["type"] == "array":
        least = node.get("minItems", 0)
        return f"a list{f' of at least {least}' if least else ''} (each item {takes(node['items'], guards=guards)})"
    if node["type"] == "string":
        return "text" + (f" of {PATTERN_WORDS[node['pattern']]}" if "pattern" in node else "")
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    return words[node["type"]] + _limits(node, guards)


def _limits(node: Node, guards: bool) -> str:
    # A limit that no sensible value comes near would only distract from the lower one.
    if not guards and node.get("maximum", 0) >= SMALLEST_GUARD:
        node = {key: value for key, value in node.items() if key != "maximum"}
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']} to {_count(node['maximum'])}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    parts = [f"{word} {_count(node[key])}" for key, word in words.items() if key in node]
    return f" {' and '.join(parts)}".replace(" and of ", " and ") if parts else ""


def _count(value: float) -> str:
    """Return the number as text: large powers of 10, powers of 2, and powers of 2 minus 1 as powers."""
    if value < SMALLEST_GUARD:
        return str(value)
    number = int(value)
    if number == 10 ** (len(str(number)) - 1):
        return f"10^{len(str(number)) - 1}"
    return f"2^{number.bit_length()} - 1" if (number + 1) & number == 0 else f"2^{number.bit_length() - 1}"


def wrong_value(path: Path, node: Node, value: Any) -> Problem:
    """Return the problem of an invalid value."""
    way_out = _way_out(node, value)
    is_large = isinstance(value, (int, float)) and value >= SMALLEST_GUARD
    message = f"{dotted(path)} ({show(value)}) must be {takes(node, guards=is_large)}" + (
        f"; {way_out}" if way_out else ""
    )
    return Problem(message, (dotted(path),))


def missing_value(path: Path, node: Node) -> Problem:
    """Return the problem of a required setting that was not given."""
    return Problem(f"{dotted(path)} is required; set it to {takes(node)}", (dotted(path),))


def _way_out(node: Node, value: Any) -> str:
    options = node.get("anyOf", [node])
    types = {option.get("type") for option in options}
    choices = [str(choice) for option in options for choice in option.get("enum", ())]
    near = difflib.get_close_matches(str(value), choices, n=1) if choices else []
    if near:
        return f"did you mean {near[0]}?"
    if "boolean" in types and str(value).lower() in _BOOLEAN_WORDS:
        return f"write {show(_BOOLEAN_WORDS[str(value).lower()])}"
    # 1e3 is a float in YAML, and a count must be a whole number.
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if types & {"integer", "number"} and isinstance(value, str) and _is_number(value):
        if not math.isfinite(float(value)):
            return "it is larger than the largest number, about 1.8e308"
        return f"write {value} without quotes"
    if "string" in types and not choices and isinstance(value, (bool, int, float)):
        return "write it in quotes in the file, so that it is text"
    default = node.get("default", {})
    # The default of a section or of a filled list is too long for the end of a sentence.
    return (
        ""
        if isinstance(default, dict) or (isinstance(default, list) and default)
        else f"the default is {show(default)}"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def unknown_setting(path: Path) -> Problem:
    """Return the problem of an unknown setting, with the nearest names, or else with all names of its section."""
    known, node = walk(path)
    named = path[: len(known) + 1]
    if dotted(named) in REMOVED:
        return removed_setting(dotted(named))
    prefix = f"{dotted(known)}." if known else ""
    start = f"{dotted(named)} is not a setting"
    fields = section_fields(node)
    if fields is None:
        way_out = f"write {dotted(known)}=VALUE" if item_node(node) is None else "its items are numbered from 0"
        return Problem(f"{start}: {dotted(known)} takes {takes(node)}; {way_out}", (dotted(named),))
    name = str(named[-1])
    near = difflib.get_close_matches(name, fields, n=1)
    # The same name in another section is a likelier mistake than a misspelling, so it comes first.
    candidates = _elsewhere(name, 1.0) or [prefix + found for found in near] or _elsewhere(name, 0.8)
    if candidates:
        return Problem(f"{start}; did you mean {' or '.join(candidates)}?", (dotted(named), *candidates))
    return Problem(f"{start}; {dotted(known) or 'a run file'} has {', '.join(fields)}", (dotted(named),))


def _elsewhere(name: str, cutoff: float) -> list[str]:
    """Return at most two settings of any section whose name is similar to ``name``, by ``cutoff`` (1: identical)."""
    by_name: dict[str, list[str]] = {}
    for path, _ in all_settings():
        by_name.setdefault(path.rsplit(".", 1)[-1], []).append(path)
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=cutoff)
    return by_name[near[0]][:2] if near else []
