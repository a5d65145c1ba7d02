"""Problems of a configuration, and the error that lists all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from qsparse_moe.errors import ConfigError

_LONGEST_VALUE = 60


class Problem(NamedTuple):
    """One broken rule: the message for the user, and the dotted paths of the settings that it involves."""

    message: str
    paths: tuple[str, ...] = ()


def dotted(parts: Sequence[str | int]) -> str:
    """Return ``data.sources.0`` for ``("data", "sources", 0)``."""
    return ".".join(str(part) for part in parts)


def show(value: Any) -> str:
    """Return ``value`` as YAML text on one line, cut to a readable length."""
    if isinstance(value, float) and not math.isfinite(value):
        # YAML writes them as .inf, -.inf and .nan; JSON has no words for them.
        return f".{value}".replace(".-", "-.")
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def raise_if_any(problems: Sequence[Problem], where: str) -> None:
    """Raise one ConfigError that lists every problem on a line of its own; do nothing if there is none."""
    # Two overrides of one unknown setting have the same message, which is listed once.
    messages = list(dict.fromkeys(problem.message for problem in problems))
    if not messages:
        return
    if len(messages) == 1:
        raise ConfigError(messages[0])
    raise ConfigError("\n  ".join([f"{where} breaks {len(messages)} rules:", *messages]))
