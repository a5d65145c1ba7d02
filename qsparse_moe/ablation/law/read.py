"""Observations from the rows of results files, checked: what does not belong together is not fitted together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from qsparse_moe.ablation.grid.results import read_results
from qsparse_moe.ablation.law.observations import Observations
from qsparse_moe.errors import ConfigError

Unit = Literal["nats", "bits", "bits-per-byte"]
UNITS: dict[Unit, str] = {"nats": "nats a token", "bits": "bits a token", "bits-per-byte": "bits a byte"}
"""What a loss can be given in."""
_SAME_BYTES = 0.02  # a token is as many bytes in all runs, up to which validation rows were read
_SIZES = (
    "total_parameters",
    "kept_parameters",
    "active_parameters",
    "hidden_size",
    "num_layers",
    "num_experts",
    "experts_per_token",
    "expert_hidden_size",
)
_PARTS = ("attention", "router", "shared", "experts_active", "dense")


@dataclass(frozen=True)
class Runs:
    """The observations of the finished runs of some files."""

    observations: Observations
    files: tuple[str, ...]
    left_out: int
    """Runs that did not finish."""


def read_runs(paths: Sequence[Path], *, unit: Unit = "nats", last_only: bool = False, min_tokens: int = 0) -> Runs:
    """The observations of every finished run.

    Args:
        paths: results files, or folders with a ``results.jsonl``.
        unit: of the losses.
        last_only: whether a run gives its last evaluation alone instead of its whole curve.
        min_tokens: evaluations before so many tokens are left out.

    Raises:
        ConfigError: a file cannot be read or is of another version, a row lacks a number, a run stands twice, runs have
            different vocabularies or tokens, or nothing is left.
    """
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    left_out = 0
    for path in paths:
        for row in read_results([path]):
            where = f"{path}, run {row.get('id')}"
            name = f"{row.get('grid')}/{row.get('id')}"
            if name in found:
                raise ConfigError(f"{where}: it also stands in {found[name][0]}; name each file once")
            if row.get("finished") is True:
                found[name] = (where, row)
            else:
                left_out += 1
    if not found:
        raise ConfigError(f"{_names(paths)}: no finished run in it ({left_out} unfinished); finish the grid first")
    return Runs(
        _observations(list(found.values()), unit, last_only, min_tokens, paths), tuple(map(str, paths)), left_out
    )


def _observations(
    found: Sequence[tuple[str, Mapping[str, Any]]],
    unit: Unit,
    last_only: bool,
    min_tokens: int,
    paths: Sequence[Path],
) -> Observations:
    columns: list[dict[str, float]] = []
    configurations: dict[str, int] = {}
    first: tuple[str, float, float] | None = None
    for run, (where, row) in enumerate(found):
        sizes = _sizes(row, where)
        first = _check_same_text(first, row, where)
        configuration = configurations.setdefault(_configuration(row, sizes), len(configurations))
        for tokens, loss in _curve(row, where, unit, last_only):
            if tokens >= min_tokens:
                columns.append(sizes | {"tokens": tokens, "loss": loss, "run": run, "configuration": configuration})
    if not columns:
        raise ConfigError(f"{_names(paths)}: no evaluation after {min_tokens} tokens (--min-tokens); lower it")
    whole = {"run", "configuration"}
    arrays: dict[str, Any] = {
        key: np.array([column[key] for column in columns], np.int64 if key in whole else np.float64)
        for key in columns[0]
    }
    return Observations(**arrays)


def _sizes(row: Mapping[str, Any], where: str) -> dict[str, float]:
    values = {name: _positive(row, name, where) for name in _SIZES}
    sparsity = row.get("sparsity")
    if not _is_number(sparsity) or not 0 <= sparsity < 1:
        raise ConfigError(f"{where}: sparsity ({sparsity}) must lie in [0, 1); make the file again")
    if values["experts_per_token"] > values["num_experts"]:
        raise ConfigError(
            f"{where}: experts_per_token ({row['experts_per_token']}) must be at most num_experts "
            f"({row['num_experts']}); make the file again"
        )
    active = _active_weights(row, where)
    kept = values["kept_parameters"] - (values["active_parameters"] - active)
    if kept <= 0:
        raise ConfigError(
            f"{where}: kept_parameters ({row['kept_parameters']}) is less than what Q-Sparse has no part in, "
            f"active_parameters less active_weights_by_part ({values['active_parameters'] - active:.0f}); "
            "make the file again"
        )
    return {
        "total": values["total_parameters"],
        "active": active,
        # Embedding, head and norms are in both counts whole, and in neither of ours.
        "kept": kept,
        "experts": values["num_experts"],
        "experts_per_token": values["experts_per_token"],
        "granularity": 4 * values["hidden_size"] / values["expert_hidden_size"],
        "sparsity": float(sparsity),
        "backbone": values["num_layers"] * values["hidden_size"] ** 2,
    }


def _active_weights(row: Mapping[str, Any], where: str) -> float:
    parts = row.get("active_weights_by_part")
    if not isinstance(parts, dict) or not parts or not all(_is_number(value) for value in parts.values()):
        raise ConfigError(f"{where}: active_weights_by_part ({parts}) must hold numbers by part; make the file again")
    return float(sum(parts.get(name, 0) for name in _PARTS))


def _curve(row: Mapping[str, Any], where: str, unit: Unit, last_only: bool) -> list[tuple[float, float]]:
    observations: list[Any] = [[row.get("tokens"), row.get("loss"), row.get("bits_per_byte")]]
    if not last_only and row.get("curve"):
        observations = row["curve"]
    for point in observations:
        if not isinstance(point, list) or len(point) != 3 or not all(_is_number(v) and v > 0 for v in point):
            raise ConfigError(
                f"{where}: an evaluation is {point}; it must be tokens, loss and bits a byte, all above 0 "
                "(a run that diverged has none: remove its line)"
            )
    scales = {"nats": 1.0, "bits": 1 / math.log(2)}
    return [
        (float(t), float(b) if unit == "bits-per-byte" else float(loss) * scales[unit]) for t, loss, b in observations
    ]


def _check_same_text(
    first: tuple[str, float, float] | None, row: Mapping[str, Any], where: str
) -> tuple[str, float, float]:
    """Losses of different tokens or vocabularies are no observations of one law."""
    vocabulary = _positive(row, "embedding_parameters", where) / row["hidden_size"]
    token_bytes = _positive(row, "loss", where) / _positive(row, "bits_per_byte", where) / math.log(2)
    if first is None:
        return where, vocabulary, token_bytes
    other, other_vocabulary, other_bytes = first
    if not math.isclose(vocabulary, other_vocabulary, rel_tol=1e-9):
        raise ConfigError(
            f"{where}: embedding and head have {vocabulary:g} rows (embedding_parameters / hidden_size) and those of "
            f"{other} {other_vocabulary:g}; one law is fitted to runs of one vocabulary, so name their files apart"
        )
    if not math.isclose(token_bytes, other_bytes, rel_tol=_SAME_BYTES):
        raise ConfigError(
            f"{where}: a validation token is {token_bytes:.3f} bytes and {other_bytes:.3f} in {other}; one law is "
            "fitted to runs of one tokenizer and one validation text, so name their files apart"
        )
    return first


def _configuration(row: Mapping[str, Any], sizes: Mapping[str, float]) -> str:
    settings = {name: value for name, value in (row.get("settings") or {}).items() if name != "training.seed"}
    return json.dumps([settings, sizes], sort_keys=True)


def _positive(row: Mapping[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{where}: {name} ({value}) must be a number above 0; make the file again")
    return float(value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
