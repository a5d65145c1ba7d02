"""Read and write YAML without the traps of YAML 1.1.

``1e-3`` is a number; ``yes``, ``on``, ``2024-01-01``, ``12:30``, and ``010`` are text; a duplicate key is an error. The
output of ``dump_yaml`` has the same meaning for this reader and for readers of YAML 1.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from qsparse_moe.config.problems import Problem
from qsparse_moe.errors import ConfigError

# PyYAML requires a dot in the mantissa and a sign in the exponent, and so reads 1e-3 as text.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_UNICODE_BREAKS = set("\x85\u2028\u2029")
# PyYAML chooses among the patterns by the first character of a scalar, so each is listed with its possible first ones.
_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    # A leading zero makes text, because YAML 1.1 reads 010 as the octal number 8.
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above, which records duplicate keys."""

    # It is empty, because the resolvers of SafeLoader would otherwise be inherited, and with them yes, on and 010.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[str, int, int]] = []

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        """Return the number; a literal above the largest float stays text, so that only ``.inf`` is infinite."""
        number = super().construct_yaml_float(node)
        text = str(node.value)
        return text if math.isinf(number) and "inf" not in text.lower() else number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            # PyYAML itself keeps the last of two equal keys and reports nothing.
            if key.value in first_line:
                self.duplicates.append((key.value, line, first_line[key.value]))
            first_line.setdefault(key.value, line)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes texts that this package's reader, unlike YAML 1.1, would not read as text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return ``text`` as a scalar; PyYAML folds Unicode line breaks wrongly unless they are escaped."""
        style = '"' if _UNICODE_BREAKS & set(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Dumper.add_representer(str, _Dumper.represent_text)
for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def parse_yaml(text: str, where: str) -> tuple[Any, list[Problem]]:
    """Return the value of one YAML document, and a problem for every duplicate key.

    Raises:
        ConfigError: the text is not valid YAML; the message names ``where`` and the line.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}{_position(error)} is not valid YAML: {_reason(error)}; correct it there") from None
    # Integers of more than 4300 digits, and values nested deeper than the stack allows.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read as YAML: {error}; shorten or flatten that value") from None
    problems = [
        Problem(f"{where}, line {line}: the key {key} occurs twice (first in line {first}); keep one of them")
        for key, line, first in loader.duplicates
    ]
    return value, problems


def plain_scalar(text: str) -> str:
    """Return the scalar in ``text`` as it is written: ``4711`` for ``4711 # a comment``."""
    node = _Loader(text).get_single_node()
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def dump_yaml(value: Any) -> str:
    """Return ``value`` (mappings, lists, text, numbers) as YAML text that ``parse_yaml`` reads as an equal value."""
    # The settings stay in the order of the schema, in which docs/settings.md lists them.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    reason = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).strip()
    # The parser notices an open bracket or quote only far behind it, so the message also names where it begins.
    opening = getattr(error, "context_mark", None)
    return f"{reason} ({error.context} that begins in line {opening.line + 1})" if opening else reason  # type: ignore
