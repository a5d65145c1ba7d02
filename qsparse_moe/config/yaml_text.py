"""YAML in and out, without the traps of YAML 1.1.

``1e-3`` is a number; ``yes``, ``on``, ``2024-01-01``, ``12:30`` and ``010`` are text; a key that stands twice is a
broken rule. What ``dump_yaml`` writes means the same to this reader and to one of YAML 1.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from qsparse_moe.config.problems import Problem
from qsparse_moe.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_UNICODE_BREAKS = set("\x85\u2028\u2029")
_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above, which remembers keys that stand twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[str, int, int]] = []

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        """Return the number; a literal beyond the largest one stays text, which ``.inf`` alone is not."""
        number = super().construct_yaml_float(node)
        text = str(node.value)
        return text if math.isinf(number) and "inf" not in text.lower() else number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first_line:
                self.duplicates.append((key.value, line, first_line[key.value]))
            first_line.setdefault(key.value, line)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the texts which our reader, beside YAML 1.1, would take for something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """``text`` as a scalar; PyYAML folds the line breaks of Unicode wrongly unless they are escaped."""
        style = '"' if _UNICODE_BREAKS & set(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Dumper.add_representer(str, _Dumper.represent_text)
for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def parse_yaml(text: str, where: str) -> tuple[Any, list[Problem]]:
    """The value of one YAML document, and a problem for every key that stands twice in a mapping.

    Raises:
        ConfigError: the text is no YAML; ``where`` and the line are named.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{_position(error)} is not valid YAML: {_reason(error)}; correct it there") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read as YAML: {error}; shorten or flatten that value") from None
    problems = [
        Problem(f"{where}, line {line}: the key {key} stands twice (first in line {first}); keep one of them")
        for key, line, first in loader.duplicates
    ]
    return value, problems


def plain_scalar(text: str) -> str:
    """Return the one scalar of ``text`` as it is written: ``4711 # a comment`` is ``4711``."""
    node = _Loader(text).get_single_node()
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def dump_yaml(value: Any) -> str:
    """``value`` (mappings, lists, text, numbers) as YAML text that ``parse_yaml`` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    reason = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).strip()
    opening = getattr(error, "context_mark", None)
    return f"{reason} ({error.context} that begins in line {opening.line + 1})" if opening else reason  # type: ignore
