"""A broken rule as a sentence, and many of them as one error."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from qsparse_moe.errors import ConfigError

_LONGEST_VALUE = 60


class Problem(NamedTuple):
    """One broken rule: the sentence for the user, and the dotted paths of the settings that it joins."""

    message: str
    paths: tuple[str, ...] = ()


def dotted(parts: Sequence[str | int]) -> str:
    """``("data", "sources", 0)`` as ``data.sources.0``."""
    return ".".join(str(part) for part in parts)


def show(value: Any) -> str:
    """``value`` as it could stand in the YAML file, on one line and cut to a readable length."""
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}".replace(".-", "-.")
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def raise_if_any(problems: Sequence[Problem], where: str) -> None:
    """Raise one ConfigError that holds every problem, each on its own line; nothing where there is none."""
    messages = list(dict.fromkeys(problem.message for problem in problems))
    if not messages:
        return
    if len(messages) == 1:
        raise ConfigError(messages[0])
    raise ConfigError("\n  ".join([f"{where} breaks {len(messages)} rules:", *messages]))
