"""Results of an earlier report that stand for runs of a grid, so that these are not trained again. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.grid.kept_lines import MOST_NAMED, names_of
from qsparse_moe.ablation.grid.load import Grid, GridRun
from qsparse_moe.ablation.grid.results import RESULTS, RunResult, read_results
from qsparse_moe.config.load import config_from_settings
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.folder import changed_settings, may_change

logger = logging.getLogger(__name__)

_DECISIVE = ("training.evaluation_rows", "training.skip_steps", "training.steps")
"""Settings that may change when a run is resumed, and whose change makes a result another one."""


def recorded_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that make a run the one it is, by section.

    Those at their defaults are among them, because a later version may have other defaults.
    """
    return _without_free(config.model_dump(mode="json"), "")


def with_earlier_results(grid: Grid, path: Path, *, trains: bool) -> Grid:
    """Return ``grid`` with the finished runs of a results file as its own.

    Args:
        grid: the grid.
        path: the ``results.jsonl`` of an earlier report of this grid, or its folder.
        trains: whether other runs will be trained beside these. Earlier versions did not record the settings of a
            run; such lines can only be reported.

    Finished runs of the file that are not in the grid are counted and named on stderr.

    Raises:
        ConfigError: the file cannot be read, has no finished run of this grid, has one twice, or has one with other
            settings.
    """
    by_id = _finished(grid, path)
    found = {run.id: RunResult(**by_id[run.id]) for run in grid.runs if run.id in by_id}
    if not found:
        known = ", ".join(list(by_id)[:MOST_NAMED]) or "none at all"
        raise ConfigError(
            f"--results ({path}) has no finished run of {grid.name}, but {known}; name the {RESULTS} of an earlier "
            "report of this grid"
        )
    for run in grid.runs:
        if run.id in found:
            _check_settings(run, found[run.id], path, trains=trains)
    others = [name for name in by_id if name not in found]
    if others:
        logger.warning(
            "--results (%s) has %s that %s does not have; its report leaves them out", path, names_of(others), grid.name
        )
    return replace(grid, earlier=found)


def _finished(grid: Grid, path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the finished runs by id, those of this grid if another one has runs of the same names."""
    ids = {run.id for run in grid.runs}
    found: dict[tuple[bool, str], dict[str, Any]] = {}
    for record in read_results([path]):
        key = record["grid"] == grid.name, record["id"]
        if record["finished"] and found.setdefault(key, record) is not record and record["id"] in ids:
            raise ConfigError(
                f"--results ({path}) has two finished lines of {record['id']}; remove the line that is not to count"
            )
    # True after False, so that the grid's own take precedence.
    return {name: record for (_, name), record in sorted(found.items(), key=lambda item: item[0][0])}


def _check_settings(run: GridRun, result: RunResult, path: Path, *, trains: bool) -> None:
    if result.config is None:
        if not trains:
            return
        raise ConfigError(
            f"--results ({path}): {run.id} does not record its settings, so that runs trained beside it may not be "
            "comparable; add --report-only, or leave out --results to train every run"
        )
    try:
        now = run.config.model_dump(mode="json")
        before = config_from_settings(_with_free(result.config, now, ""), str(path))
    except ConfigError as error:
        raise ConfigError(f"--results ({path}): the settings of {run.id} cannot be read: {error}") from None
    changed = changed_settings(before, run.config, also=_DECISIVE)
    if changed:
        raise ConfigError(
            f"--results ({path}): {run.id} has other settings than the grid now gives it: {'; '.join(changed)}. "
            "Restore them, or leave out --results to train every run"
        )


def _is_free(path: str) -> bool:
    return may_change(path) and path not in _DECISIVE


def _without_free(settings: Mapping[str, Any], path: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        own = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            inner = _without_free(value, own)
            # A section all of whose settings are free.
            kept |= {name: inner} if inner else {}
        elif not _is_free(own):
            kept[name] = value
    return kept


def _with_free(recorded: Mapping[str, Any], now: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the recorded settings with the free ones of ``now``, with which they are a configuration that can run."""
    found = dict(recorded)
    for name, value in now.items():
        own = f"{path}.{name}" if path else name
        if isinstance(value, dict) and isinstance(found.get(name, {}), dict):
            found[name] = _with_free(found.get(name, {}), value, own)
        elif _is_free(own):
            found[name] = value
    return found
