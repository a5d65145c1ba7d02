"""The rows of ``results.jsonl``: what one run of a grid came to, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import Site
from qsparse_moe.errors import ConfigError

RESULTS_VERSION = 2
"""Of the rows; a reader refuses every other."""
RESULTS = "results.jsonl"
_ADDED = ("choices", "varied_sparsity", "natural_zeros")
"""Lists that rows of this version did not have at first; they are empty there."""


@dataclass(frozen=True)
class RunResult:
    """What one run came to; a line of ``results.jsonl``.

    Costs are counted from the config, except where natural zeros do the selecting (ReLU, thresholds): there
    ``kept_parameters``, ``kept_training_flops_per_token`` and the bytes follow the zeros that the run last measured.
    """

    grid: str
    id: str
    variant: str
    """The point of the grid: ``id`` without the seed."""
    seed: int
    settings: dict[str, Any]
    """What the variant and the axes set, by dotted path."""
    finished: bool
    error: str | None
    """The end of what a broken run printed."""
    steps: int
    """Done at the last evaluation, as are the tokens."""
    tokens: int
    loss: float | None
    """On validation rows, nats a token, at the last evaluation."""
    bits_per_byte: float | None
    """The same in bits a byte."""
    curve: list[tuple[int, float, float]]
    """Tokens, loss and bits a byte of every evaluation."""
    total_parameters: int
    """Stored, without embedding and head."""
    embedding_parameters: int
    """Stored by embedding and head."""
    active_parameters: int
    """That a token uses by routing; of the embedding one row."""
    kept_parameters: float
    """Those of them whose input Q-Sparse keeps."""
    hidden_size: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    expert_hidden_size: int
    sparsity: float
    """Mean S of the plan."""
    active_weights_by_part: dict[str, int]
    """Of attention, router, experts_active (A of E) and, where there are such, shared experts and dense layers."""
    training_flops_per_token: float
    """That dense kernels execute, forward and backward."""
    kept_training_flops_per_token: float
    """What would be left of it if every zero were skipped."""
    weight_bytes_1: float
    """Bytes of weights, in the run's precision, that a step of one token needs in generation."""
    weight_bytes_16: float
    """The same for a step of 16 tokens, counted as independent."""
    tokens_per_second: float | None
    """In training, median over the logged steps, all ranks."""
    layer_grad_norms: list[float] | None
    """Gradient norm of each layer's matrices, mean over the logged steps of the second half of the run; None where
    ``metrics.layer_gradients`` was off."""
    choices: list[tuple[str, list[str]]] = field(default_factory=list)
    """Of the variant and of every axis its label, and the settings that the axis sets."""
    varied_sparsity: list[tuple[int, Site, list[int] | None, float]] = field(default_factory=list)
    """Layer, site, experts (None: all, or a site without experts) and S, wherever runs of the grid differ in S."""
    natural_zeros: list[tuple[Site, list[int], float, float]] = field(default_factory=list)
    """Sites at which S lies below the zeros that the activation function produces: the site, the layers (empty: all),
    the measured fraction of zeros, and the fraction that the selection chose."""
    version: int = field(default=RESULTS_VERSION, kw_only=True)

    def as_dict(self) -> dict[str, Any]:
        """By name, the version first."""
        return {"version": self.version, **asdict(self)}


def results_text(results: Iterable[RunResult]) -> str:
    """The text of a ``results.jsonl``."""
    return "".join(json.dumps(result.as_dict()) + "\n" for result in results)


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of results files, in order; of a folder those of the ``results.jsonl`` in it.

    Raises:
        ConfigError: there is no such file, or a line of it is of another version, cut off or no row.
    """
    return [row for path in paths for row in _read_file(path / RESULTS if path.is_dir() else path)]


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); name a {RESULTS} that qsparse-moe ablate wrote, or the folder it is in"
        ) from None
    if not lines:
        raise ConfigError(f"{path} is empty; run qsparse-moe ablate with its grid again, finished runs are kept")
    return [_row(line, f"{path}, line {number},") for number, line in enumerate(lines, 1)]


def _row(line: str, where: str) -> dict[str, Any]:
    again = "run qsparse-moe ablate with its grid and folders again: it keeps finished runs and writes the file anew"
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where} is cut off or no JSON (it ends in {show(line[-30:])}); {again}") from None
    version = row.get("version", 1) if isinstance(row, dict) else None
    if version != RESULTS_VERSION:
        raise ConfigError(f"{where} is of version {show(version)}, and {RESULTS_VERSION} is read here; {again}")
    missing = [one.name for one in fields(RunResult) if one.name not in row and one.name not in _ADDED]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; {again}")
    return {**{name: [] for name in _ADDED}, **row}
