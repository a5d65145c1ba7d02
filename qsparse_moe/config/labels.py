"""Short labels of settings for legends, tables, and the names of runs. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

LETTERS = {
    "model.hidden_size": "D",
    "model.num_layers": "L",
    "model.moe.num_experts": "E",
    "model.moe.experts_per_token": "A",
    "model.moe.expert_hidden_size": "F",
    "model.sparsity.default": "S",
}
"""Settings with an established letter; their labels have the form ``E=8``."""
OVERRIDES = "model.sparsity.overrides"
_MOST_CHARACTERS = 48


def setting_label(path: str, value: Any) -> str:
    """Return one setting in words: ``E=8``, ``rescale unit``, ``layer 3 experts 0-1 expert_hidden S=0.9``."""
    parts = path.split(".")
    if path in LETTERS:
        return f"{LETTERS[path]}={_text(value)}"
    if path == OVERRIDES and isinstance(value, Sequence):
        return "; ".join(override_label(override) for override in value) or "no overrides"
    if path.startswith(f"{OVERRIDES}."):
        # A grid may vary a whole override (the fourth part is its index), or one value inside of it.
        return override_label(value if len(parts) == 4 else {parts[-1]: value})
    if path.startswith("model.sparsity.sites."):
        return f"{parts[-1]} S={_text(value)}"
    return f"{parts[-1]} {_text(value)}"


def override_label(override: Mapping[str, Any]) -> str:
    """Return one entry of ``model.sparsity.overrides`` in words; parts that are not given are left out."""
    words = place_label(override.get("layers"), override.get("site"), override.get("experts"))
    if override.get("sparsity") is not None:
        words = f"{words} S={_text(override['sparsity'])}".lstrip()
    return words or "everywhere"


def place_label(layers: Any = None, site: Any = None, experts: Any = None) -> str:
    """Return a label such as ``layer 3 experts 0-1 expert_hidden``; None means all and is left out."""
    words = [_selected("layer", layers), _selected("expert", experts), None if site is None else str(site)]
    return " ".join(word for word in words if word)


def ranges_text(numbers: Sequence[int]) -> str:
    """Return ``0-2,5`` for 0, 1, 2, and 5."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def name_of(label: str) -> str:
    """Return ``label`` as part of a run's name: letters, digits, and ``._-`` only."""
    # Only characters that training.name allows are left.
    text = label.replace("; ", "_").replace("=", "").replace(",", ".").replace(" ", "-")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")


def _selected(noun: str, selector: Any) -> str | None:
    if selector is None:
        return None
    if isinstance(selector, Sequence) and not isinstance(selector, str):
        selector = ranges_text(selector)
    text = str(selector)
    return f"{noun} {text}" if text.isdecimal() else f"{noun}s {text}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    # JSON writes true and null as a run file does, and Python does not.
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
