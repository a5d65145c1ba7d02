"""Which of a run's metrics are the same in every run of the same config: all but those that a clock measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEASURED = ("seconds", "throughput/", "memory/")
"""How the names of metrics begin that a clock or the process's memory decides."""


def same_in_every_run(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a logged step of ``metrics.jsonl`` without what is measured."""
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}
