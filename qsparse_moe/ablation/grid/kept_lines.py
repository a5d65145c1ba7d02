"""Lines of ``results.jsonl`` that a new report has no result for, and keeps, so that no measured run is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.grid.results import RunResult, read_record, results_text
from qsparse_moe.errors import ConfigError, naming

MOST_NAMED = 3
"""Number of runs that a message about several names."""
RunKey = tuple[str, str]
"""Grid and id of a run: two grids may name their runs alike."""


@dataclass(frozen=True)
class ResultLines:
    """The lines of a results file: those of a report, and those of other runs that were there before."""

    text: str
    """The whole file."""
    kept: tuple[str, ...]
    """The ids of the other runs, whose lines are the last ones."""


def lines_to_write(results: Sequence[RunResult], earlier: Iterable[RunResult], file: Path) -> ResultLines:
    """Return the lines of ``results``, followed by those of measured runs that would otherwise be lost.

    A line that ``file`` has now stays if its run is not among ``results``, or is there without a measurement while the
    line has one; such a line takes the place of the new one.

    Args:
        results: the results of a report that finished or failed.
        earlier: results that the grid has from an earlier report, whether its report needs them or not.
        file: the ``results.jsonl`` that will be replaced, if there is one.
    """
    new = {_key(result.as_dict()): result.finished for result in results}
    there, _ = _readable(file)
    in_file = {_key(record) for record, _ in there}
    # Those of the file stay as they were written.
    old = [*(one for one in _as_lines(earlier) if _key(one[0]) not in in_file), *there]
    kept = [(_key(record), line) for record, line in old if _is_kept(record, new)]
    others = {key for key, _ in kept}
    written = [result for result in results if _key(result.as_dict()) not in others]
    text = results_text(written) + "".join(f"{line}\n" for _, line in kept)
    return ResultLines(text, tuple(dict.fromkeys(name for (_, name), _ in kept)))


def _is_kept(record: Mapping[str, Any], new: Mapping[RunKey, bool]) -> bool:
    """Return whether a line stays, from the runs that have new lines and whether these are finished."""
    key = _key(record)
    return key not in new or (record["finished"] and not new[key])


def set_aside(file: Path) -> Path | None:
    """Rename a results file with a line that cannot be read, so that it is not lost; return its new path, or None."""
    _, is_complete = _readable(file)
    if is_complete:
        return None
    aside = next(path for number in count(1) if not (path := file.with_name(f"{file.name}.{number}")).exists())
    with naming(aside):
        os.rename(file, aside)
    return aside


def names_of(ids: Sequence[str]) -> str:
    """Return the number of runs with the names of a few, such as ``5 runs (a, b, c, ...)``."""
    more = ", ..." if len(ids) > MOST_NAMED else ""
    return f"{len(ids)} {'run' if len(ids) == 1 else 'runs'} ({', '.join(ids[:MOST_NAMED])}{more})"


def _key(record: Mapping[str, Any]) -> RunKey:
    return record["grid"], record["id"]


def _as_lines(results: Iterable[RunResult]) -> list[tuple[dict[str, Any], str]]:
    records = [result.as_dict() for result in results]
    return [(record, json.dumps(record)) for record in records]


def _readable(file: Path) -> tuple[list[tuple[dict[str, Any], str]], bool]:
    """Return record and text of the lines of a results file that can be read, and whether these are all of them."""
    found = []
    lines = file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append((read_record(line, f"{file}, line {number},"), line))
        except ConfigError:
            continue
    return found, len(found) == len(lines)
