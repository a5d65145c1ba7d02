"""``metrics.jsonl``: one line with one JSON object per logged step, in the order of the steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsparse_moe.errors import CheckpointError


class MetricsFile:
    """Appends logged steps to ``metrics.jsonl``; each line is handed to the operating system before the next step."""

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        """Open ``path`` for a run that continues after ``start_step`` steps; later steps in the file are dropped.

        Raises:
            CheckpointError: a line before the last is not a logged step. A last line that was cut off is dropped.
        """
        truncate_after(path, start_step)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(
        self,
        step: int,
        tokens: int,
        seconds: float,
        metrics: Mapping[str, float],
        experts: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one logged step. Infinity and NaN, which JSON does not have, are written as null.

        ``experts`` are the values of every expert (``experts.expert_values``), written under the key of that name.
        """
        row: dict[str, Any] = {"step": step, "tokens": tokens, "seconds": seconds} | _finite(metrics)
        if experts:
            row["experts"] = dict(experts)
        # NaN is not JSON: fail here rather than write a line that other parsers refuse.
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        # Handed to the operating system at once, so that a killed run loses no logged step.
        self._file.flush()

    def amend(self, step: int, tokens: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Add metrics to the last logged step, or append a new line if the last step is not ``step``."""
        rows = read_metrics(self._path)
        if not rows or rows[-1]["step"] != step:
            rows.append({"step": step, "tokens": tokens, "seconds": seconds})
        rows[-1] |= _finite(metrics)
        # The file is replaced as a whole: a line in its middle cannot change its length in place.
        self._file.close()
        _replace(self._path, rows)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the logged steps of a ``metrics.jsonl``, none if the file does not exist.

    A last line that was cut off, by a kill or a full disk, is left out.

    Raises:
        CheckpointError: a line before the last is not a logged step.
    """
    if not path.exists():
        return []
    # Split as bytes: the cut may lie inside a character, which would fail to decode.
    lines = path.read_bytes().split(b"\n")
    complete, cut = lines[:-1], lines[-1]
    rows = [_parse(line, path, number) for number, line in enumerate(complete, 1)]
    return rows if not cut else rows + _last(cut)


def truncate_after(path: Path, step: int) -> None:
    """Drop the logged steps after ``step`` from the file, if it exists, by an atomic replacement."""
    if not path.exists():
        return
    _replace(path, [row for row in read_metrics(path) if row["step"] <= step])


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _replace(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        # Before the rename: after a power failure the new name must not belong to an empty file.
        os.fsync(file.fileno())
    beside.replace(path)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    row = _logged_step(line)
    if row is None:
        raise CheckpointError(
            f"{path}, line {number}, is {line[:60].decode(errors='replace')!r}; every line is a JSON object with a "
            f"whole-number step; delete that line, or move the file away to begin a new one"
        )
    return row


def _last(line: bytes) -> list[dict[str, Any]]:
    """Return the last line, which has no newline: one row if it is complete, none if it was cut off."""
    row = _logged_step(line)
    return [] if row is None else [row]


def _logged_step(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
