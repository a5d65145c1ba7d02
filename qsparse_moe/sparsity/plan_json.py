"""The JSON form of a sparsity plan. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qsparse_moe.config.schema import Site
from qsparse_moe.errors import ConfigError

_NAME = "qsparse_moe.sparsity_plan/"
FORMAT = f"{_NAME}3"
"""The format that is written. Version 2 added the thresholds, and version 3 the experts per token."""
_READABLE = tuple(f"{_NAME}{version}" for version in (1, 2, 3))

_Values = Mapping[tuple[int, Site], tuple[float, ...]]
PlanContent = tuple[_Values, _Values, Mapping[int, int], Mapping[int, float]]
"""The fields of a plan: S, thresholds, experts per token, and ``top_p``."""


def write_json(
    values: _Values, thresholds: _Values, experts_per_token: Mapping[int, int], top_p: Mapping[int, float]
) -> str:
    """Return the fields of a plan as JSON, with the name and version of the format."""
    entries = []
    for place, own in values.items():
        entry: dict[str, Any] = {"layer": place[0], "site": place[1], "sparsity": list(own)}
        if place in thresholds:
            entry["threshold"] = list(thresholds[place])
        entries.append(entry)
    routing: dict[int, dict[str, Any]] = {
        layer: {"layer": layer} for layer in sorted(experts_per_token.keys() | top_p.keys())
    }
    for name, by_layer in (("experts_per_token", experts_per_token), ("top_p", top_p)):
        for layer, number in by_layer.items():
            routing[layer][name] = number
    content = {"format": FORMAT, "values": entries} | ({"routing": list(routing.values())} if routing else {})
    return json.dumps(content, indent=1)


def read_json(text: str) -> PlanContent:
    """Return the fields of the plan in ``text``; a plan of version 1 or 2 has no entries for its experts per token.

    Raises:
        ConfigError: the text is not a plan in a format that this version reads.
    """
    try:
        content = json.loads(text)
        version, entries = content["format"], content["values"]
        values, thresholds = _numbers(entries, "sparsity"), _numbers(entries, "threshold")
        routing = content.get("routing", [])
        top_p = {layer: float(share) for layer, share in _by_layer(routing, "top_p").items()}
        experts_per_token = _by_layer(routing, "experts_per_token")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"sparsity plan: not readable ({error!r}); write it with SparsityPlan.to_json") from None
    if version not in _READABLE:
        raise ConfigError(
            f"sparsity plan: format is {version!r}; this version reads {', '.join(map(repr, _READABLE))}; write it "
            "again with SparsityPlan.to_json"
        )
    return values, thresholds, experts_per_token, top_p


def _numbers(entries: list[dict[str, Any]], key: str) -> dict[tuple[int, Site], tuple[float, ...]]:
    """Return the numbers under ``key`` by (layer, site), of the entries that have it; every entry must have S."""
    having = [entry for entry in entries if key == "sparsity" or key in entry]
    return {(int(entry["layer"]), entry["site"]): tuple(float(v) for v in entry[key]) for entry in having}


def _by_layer(entries: list[dict[str, Any]], key: str) -> dict[int, Any]:
    return {int(entry["layer"]): entry[key] for entry in entries if key in entry}
