"""The records of ``results.jsonl``: the result and the cost of each run of a grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import Site
from qsparse_moe.errors import ConfigError

RESULTS_VERSION = 2
"""Version of the records; the reader refuses every other version."""
RESULTS = "results.jsonl"
_ADDED: dict[str, Callable[[], Any]] = {
    "choices": list,
    "varied_sparsity": list,
    "natural_zeros": list,
    "against_dense": lambda: None,
    "config": lambda: None,
}
"""Fields that earlier records of this version lack, with what returns the value that the reader fills in."""


@dataclass(frozen=True)
class RunResult:
    """The result of one run: a line of ``results.jsonl``.

    Costs are counted from the config, except for selections whose S the data decides (ReLU, thresholds): for those,
    ``kept_parameters``, ``kept_training_flops_per_token``, and the bytes follow the zeros that the run measured last.
    """

    grid: str
    id: str
    variant: str
    """Name of the grid point: ``id`` without the seed."""
    seed: int
    settings: dict[str, Any]
    """Settings of the variant and the axes, by dotted path."""
    finished: bool
    error: str | None
    """The end of the output of a failed run."""
    steps: int
    """Number of steps at the last evaluation; ``tokens`` belongs to the same evaluation."""
    tokens: int
    loss: float | None
    """Validation loss in nats per token at the last evaluation."""
    bits_per_byte: float | None
    """The same in bits per byte."""
    curve: list[tuple[int, float, float]]
    """Tokens, loss and bits per byte of every evaluation."""
    total_parameters: int
    """Stored, without embedding and head."""
    embedding_parameters: int
    """Stored by embedding and head."""
    active_parameters: int
    """Used by a token through routing, with one row of the embedding."""
    kept_parameters: float
    """Active parameters whose input is not zero."""
    hidden_size: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    expert_hidden_size: int
    sparsity: float
    """Mean S of the plan."""
    active_weights_by_part: dict[str, int]
    """Active weights of attention, router, experts_active (A of E), and, if the model has them, shared and dense."""
    training_flops_per_token: float
    """Operations that dense kernels execute, forward and backward."""
    kept_training_flops_per_token: float
    """The operations that would remain if every zero were skipped."""
    weight_bytes_1: float
    """Bytes of weights, in the precision of the run, that generation reads in a step of one token."""
    weight_bytes_16: float
    """The same for a step of 16 independent tokens."""
    tokens_per_second: float | None
    """Training speed over all ranks, median over the logged steps."""
    layer_grad_norms: list[float] | None
    """Gradient norm of the matrices of each layer, mean over the logged steps of the second half of the run.

    None if ``metrics.layer_gradients`` was off.
    """
    choices: list[tuple[str, list[str]]] = field(default_factory=list)
    """One entry for the variant and one per axis: its label and the settings that any entry of the axis sets."""
    varied_sparsity: list[tuple[int, Site, list[int] | None, float]] = field(default_factory=list)
    """Layer, site, experts, and S wherever runs of the grid differ in S; experts is None for all of them or none."""
    natural_zeros: list[tuple[Site, list[int], float, float]] = field(default_factory=list)
    """Sites at which S lies below the zeros that the activation function produces: the site, the layers (empty: all),
    the measured fraction of zeros, and the fraction that the selection chose."""
    against_dense: dict[str, float | None] | None = None
    """Differences from the same model at S = 0: the fractions of its routing choices and of its first choices that
    change, the KL divergence in nats per token, and the agreement of the likeliest token. None if the grid file does
    not ask for it (``compare_dense``), or the selection is ReLU."""
    config: dict[str, Any] | None = None
    """The settings that make the run the one it is, by section; None in lines of earlier versions."""
    version: int = field(default=RESULTS_VERSION, kw_only=True)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, with the version first."""
        return {"version": self.version, **asdict(self)}


def results_text(results: Iterable[RunResult]) -> str:
    """Return the text of a ``results.jsonl``."""
    return "".join(json.dumps(result.as_dict()) + "\n" for result in results)


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the records of results files in order. A folder stands for the ``results.jsonl`` in it.

    Raises:
        ConfigError: a file is missing, or a line is truncated, has another version, or lacks a field.
    """
    return [record for path in paths for record in _read_file(path / RESULTS if path.is_dir() else path)]


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        # splitlines() is safe here, because json.dumps escapes every other line separator.
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); name a {RESULTS} that qsparse-moe ablate wrote, or its folder"
        ) from None
    if not lines:
        raise ConfigError(f"{path} is empty; run qsparse-moe ablate with its grid again, which keeps finished runs")
    return [read_record(line, f"{path}, line {number},") for number, line in enumerate(lines, 1)]


def read_record(line: str, where: str) -> dict[str, Any]:
    """Return the record of a line; raise ConfigError, which begins with ``where``, if it cannot be read."""
    again = "run qsparse-moe ablate with its grid and folders again: it keeps finished runs and rewrites the file"
    try:
        record = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where} is truncated or not JSON (it ends in {show(line[-30:])}); {again}") from None
    # The first version had no version field.
    version = record.get("version", 1) if isinstance(record, dict) else None
    if version != RESULTS_VERSION:
        raise ConfigError(
            f"{where} has version {show(version)}, but only version {RESULTS_VERSION} can be read; {again}"
        )
    missing = [one.name for one in fields(RunResult) if one.name not in record and one.name not in _ADDED]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; {again}")
    return {**{name: default() for name, default in _ADDED.items()}, **record}
