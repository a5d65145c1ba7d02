"""``metrics.jsonl``: one JSON object a line for every logged step, in the order of the steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsparse_moe.errors import CheckpointError


class MetricsFile:
    """Appends logged steps to ``metrics.jsonl``; a line is handed to the system as a whole before the next step."""

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        """Open ``path`` for a run that goes on after ``start_step`` steps; what it holds of later steps is dropped.

        Raises:
            CheckpointError: a line before the last is no logged step. A last line that was cut off is dropped.
        """
        keep_until(path, start_step)
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
        """Append one logged step. JSON has no infinity and no NaN: such a value is written as null.

        ``experts`` are the values of every expert (``experts.expert_values``), under the key of that name.
        """
        row: dict[str, Any] = {"step": step, "tokens": tokens, "seconds": seconds} | _finite(metrics)
        if experts:
            row["experts"] = dict(experts)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def amend(self, step: int, tokens: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Add metrics to the last logged step; they become a line of their own where that is not ``step``."""
        rows = read_metrics(self._path)
        if not rows or rows[-1]["step"] != step:
            rows.append({"step": step, "tokens": tokens, "seconds": seconds})
        rows[-1] |= _finite(metrics)
        self._file.close()
        _replace(self._path, rows)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; nothing can be written after."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a ``metrics.jsonl``, none where there is no file. A last line that was cut off is left out.

    Raises:
        CheckpointError: a line before the last is no logged step.
    """
    if not path.exists():
        return []
    # A cut may fall inside a character as well.
    lines = path.read_bytes().split(b"\n")
    complete, cut = lines[:-1], lines[-1]
    rows = [_parse(line, path, number) for number, line in enumerate(complete, 1)]
    return rows if not cut else rows + _last(cut)


def keep_until(path: Path, step: int) -> None:
    """Rewrite the file, if there is one, to its logged steps up to ``step``: at once, or not at all."""
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
    """The line without an end: complete but for it, or cut off."""
    row = _logged_step(line)
    return [] if row is None else [row]


def _logged_step(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
