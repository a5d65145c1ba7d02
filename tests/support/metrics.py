"""The metrics that are the same in every run of the same config: all except those that are measured by a clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEASURED = ("seconds", "throughput/", "memory/")
"""Prefixes of the metrics that depend on the clock or on the memory of the process."""


def same_in_every_run(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a logged step of ``metrics.jsonl`` without what is measured."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}
