"""Read observations from results files, and refuse records that must not be fitted together."""

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
UNITS: dict[Unit, str] = {"nats": "nats per token", "bits": "bits per token", "bits-per-byte": "bits per byte"}
"""Labels of the units of the loss."""
# Relative tolerance for bytes per token: runs with fewer validation sequences read other parts of the same text.
_SAME_BYTES = 0.02
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
    """The observations of the finished runs of several files."""

    observations: Observations
    files: tuple[str, ...]
    left_out: int
    """Number of runs that did not finish."""


def read_runs(paths: Sequence[Path], *, unit: Unit = "nats", last_only: bool = False, min_tokens: int = 0) -> Runs:
    """Read the observations of every finished run.

    Args:
        paths: results files, or folders with a ``results.jsonl``.
        unit: the unit of the losses.
        last_only: whether to read only the last evaluation of each run instead of its whole curve.
        min_tokens: evaluations before this number of tokens are left out.

    Raises:
        ConfigError: a file cannot be read or has another version, a record lacks a number, a run occurs twice, runs
            have different vocabularies or tokens, or no observation is left.
    """
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    left_out = 0
    for path in paths:
        for record in read_results([path]):
            where = f"{path}, run {record.get('id')}"
            # Grid and run together: two grids may name their runs alike.
            name = f"{record.get('grid')}/{record.get('id')}"
            if name in found:
                raise ConfigError(f"{where}: the run also occurs in {found[name][0]}; name each file once")
            # The last loss of an unfinished run belongs to another point of its learning rate schedule.
            if record.get("finished") is True:
                found[name] = (where, record)
            else:
                left_out += 1
    if not found:
        raise ConfigError(f"{_names(paths)}: it has no finished run ({left_out} unfinished); finish the grid first")
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
    for run, (where, record) in enumerate(found):
        sizes = _sizes(record, where)
        first = _check_same_text(first, record, where)
        configuration = configurations.setdefault(_configuration(record, sizes), len(configurations))
        for tokens, loss in _curve(record, where, unit, last_only):
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


def _sizes(record: Mapping[str, Any], where: str) -> dict[str, float]:
    values = {name: _positive(record, name, where) for name in _SIZES}
    sparsity = record.get("sparsity")
    if not _is_number(sparsity) or not 0 <= sparsity < 1:
        raise ConfigError(f"{where}: sparsity ({sparsity}) must lie in [0, 1); make the file again")
    if values["experts_per_token"] > values["num_experts"]:
        raise ConfigError(
            f"{where}: experts_per_token ({record['experts_per_token']}) must be at most num_experts "
            f"({record['num_experts']}); make the file again"
        )
    active = _active_weights(record, where)
    needed = values["kept_parameters"] - (values["active_parameters"] - active)
    if needed <= 0:
        raise ConfigError(
            f"{where}: kept_parameters ({record['kept_parameters']}) is less than what Q-Sparse does not change, "
            f"active_parameters minus active_weights_by_part ({values['active_parameters'] - active:.0f}); "
            "make the file again"
        )
    return {
        "total": values["total_parameters"],
        "active": active,
        # Both counts of the record contain embedding, head, and norms in full, which the law excludes.
        "needed": needed,
        "experts": values["num_experts"],
        "experts_per_token": values["experts_per_token"],
        # G of arXiv 2402.07871, in which a dense feed-forward network is 4 times as wide as the model.
        "granularity": 4 * values["hidden_size"] / values["expert_hidden_size"],
        "sparsity": float(sparsity),
        "backbone": values["num_layers"] * values["hidden_size"] ** 2,
    }


def _active_weights(record: Mapping[str, Any], where: str) -> float:
    parts = record.get("active_weights_by_part")
    if not isinstance(parts, dict) or not parts or not all(_is_number(value) for value in parts.values()):
        raise ConfigError(f"{where}: active_weights_by_part ({parts}) must map parts to numbers; make the file again")
    return float(sum(parts.get(name, 0) for name in _PARTS))


def _curve(record: Mapping[str, Any], where: str, unit: Unit, last_only: bool) -> list[tuple[float, float]]:
    evaluations: list[Any] = [[record.get("tokens"), record.get("loss"), record.get("bits_per_byte")]]
    if not last_only and record.get("curve"):
        evaluations = record["curve"]
    for evaluation in evaluations:
        if (
            not isinstance(evaluation, list)
            or len(evaluation) != 3
            or not all(_is_number(v) and v > 0 for v in evaluation)
        ):
            raise ConfigError(
                f"{where}: an evaluation is {evaluation}; it must be tokens, loss, and bits per byte, all above 0 "
                "(a run that diverged has none: remove its line)"
            )
    scales = {"nats": 1.0, "bits": 1 / math.log(2)}
    return [
        (float(t), float(b) if unit == "bits-per-byte" else float(loss) * scales[unit]) for t, loss, b in evaluations
    ]


def _check_same_text(
    first: tuple[str, float, float] | None, record: Mapping[str, Any], where: str
) -> tuple[str, float, float]:
    """Raise ConfigError unless the run has the vocabulary and tokens of the first; a law needs comparable losses."""
    vocabulary = _positive(record, "embedding_parameters", where) / record["hidden_size"]
    # Nats per token over bits per byte gives bytes per token, up to ln 2.
    token_bytes = _positive(record, "loss", where) / _positive(record, "bits_per_byte", where) / math.log(2)
    if first is None:
        return where, vocabulary, token_bytes
    other, other_vocabulary, other_bytes = first
    if not math.isclose(vocabulary, other_vocabulary, rel_tol=1e-9):
        raise ConfigError(
            f"{where}: embedding and head have {vocabulary:g} rows (embedding_parameters / hidden_size), but those of "
            f"{other} have {other_vocabulary:g}; a law needs runs with one vocabulary, so fit these files separately"
        )
    if not math.isclose(token_bytes, other_bytes, rel_tol=_SAME_BYTES):
        raise ConfigError(
            f"{where}: a validation token has {token_bytes:.3f} bytes, but {other_bytes:.3f} in {other}; a law "
            "needs runs with one tokenizer and one validation text, so fit these files separately"
        )
    return first


def _configuration(record: Mapping[str, Any], sizes: Mapping[str, float]) -> str:
    # Without the seed, so that the seeds of a configuration compare equal.
    settings = {name: value for name, value in (record.get("settings") or {}).items() if name != "training.seed"}
    return json.dumps([settings, sizes], sort_keys=True)


def _positive(record: Mapping[str, Any], name: str, where: str) -> float:
    value = record.get(name)
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{where}: {name} ({value}) must be a number above 0; make the file again")
    return float(value)


def _is_number(value: Any) -> TypeGuard[float]:
    # bool is a subclass of int, and NaN is a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
