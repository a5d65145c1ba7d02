"""How much one cell's sparsity costs: the change of validation loss when its S alone is another.

Exactly, by an evaluation for every cell and S; and estimated for all at once (``estimate.py``). C documents.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, bootstrap_intervals, loss_by_document
from qsparse_moe.ablation.sensitivity.estimate import Estimate, estimate
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.data.packing import Array
from qsparse_moe.errors import ConfigError
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.evaluate import load_run

logger = logging.getLogger(__name__)
DEFAULT_VALUES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9)
Notify = Callable[[int, int], None]
"""Called with how many evaluations are done, of how many."""


@dataclass(frozen=True)
class CellChange:
    """One cell at one S: changes of the mean loss against the plan as it is, nats a token."""

    cell: Cell
    sparsity: float
    estimate: float
    estimate_interval: tuple[float, float]
    first_order: float
    """Of the estimate, the first-order term."""
    exact: float | None
    """None where it was not evaluated."""
    exact_interval: tuple[float, float] | None
    exact_halves: tuple[float, float] | None
    """The exact change over every other document, and over the rest."""

    @property
    def is_decided(self) -> bool:
        """Whether it was evaluated and 0 lies outside the interval."""
        return self.exact_interval is not None and not self.exact_interval[0] <= 0 <= self.exact_interval[1]


@dataclass(frozen=True)
class Agreement:
    """How well the estimate ranks what evaluation finds, and how well evaluation ranks itself."""

    sparsity: float | None
    """The S of the points compared; None: all of them."""
    points: int
    spearman: float
    pearson: float
    spearman_first_order: float
    """With the first-order term alone."""
    spearman_halves: float | None
    """Of the exact changes over one half of the documents with those over the other: where it is low, ranks are noise,
    and no estimate could rank better; more rows help. None where all is one document."""
    decided: int
    """Points whose exact change has an interval without 0."""
    spearman_decided: float | None
    """Over them alone; None where they are fewer than three."""


@dataclass(frozen=True)
class Sensitivity:
    """All cells of a model around one plan."""

    plan: SparsityPlan
    num_sequences: int
    documents: int
    loss: float
    """Of the plan as it is, nats a token."""
    changes: tuple[CellChange, ...]
    estimate_seconds: float
    exact_seconds: float | None
    evaluations: int
    """Forward passes over the rows that the exact changes took, the plan's own among them; the estimate takes one
    forward and a few backward."""
    agreement: tuple[Agreement, ...]

    @property
    def times_cheaper(self) -> float | None:
        """Seconds of all evaluations over those of the estimate."""
        return None if self.exact_seconds is None else self.exact_seconds / self.estimate_seconds


def load_ranked(
    run_dir: Path, device: torch.device | str, sparsity: float | None
) -> tuple[RunConfig, Transformer, int]:
    """A run's model, at its own plan or at one S everywhere.

    Raises:
        ConfigError: the run selects by a bound, or its router sees sparse tokens.
        CheckpointError: as ``load_run``.
    """
    config, model, step = load_run(run_dir, device)
    check_ranks(config.model)
    if sparsity is not None:
        model.set_sparsity(SparsityPlan.uniform(config.model, sparsity))
    return config, model, step


def check_ranks(config: ModelConfig) -> None:
    """Raise ConfigError where S of one cell is not the share that its ranking drops."""
    selection = config.sparsity.selection
    if selection not in ("topk", "block"):
        raise ConfigError(
            f"model.sparsity.selection ({selection}) must be topk or block for sensitivities, which change the K of "
            "one cell at a time; train the run, or a copy of its config, with one of these"
        )
    if config.moe.router_input == "sparse":
        raise ConfigError(
            "model.moe.router_input (sparse) must be dense for sensitivities: with another S for one expert there "
            "is no one sparse token that the router could see"
        )


def measure(
    model: Transformer,
    sequences: DocumentSequences,
    values: Sequence[float] = DEFAULT_VALUES,
    *,
    exact: bool = True,
    draws: int = 1000,
    notify: Notify | None = None,
) -> Sensitivity:
    """The sensitivities of every cell around the model's plan, which it keeps.

    Args:
        model: selects by rank; on any device.
        sequences: the sequences that both are measured on, so that the estimate is compared on the same text.
        values: S of which each cell takes one after the other; values with the same K as the plan's are left out.
        exact: evaluate too, cell by cell.
        draws: of the bootstrap over documents.
        notify: progress of the evaluations.
    """
    plan, labels_C = model.sparsity_plan, sequences.labels_C
    SparsityPlan.uniform(model.config, max(values)).check_fits(model.config)
    # First, so that neither pays for what is made at the first use.
    began = time.perf_counter()
    base_C = loss_by_document(model, sequences)
    base_seconds = time.perf_counter() - began
    began = time.perf_counter()
    estimated = estimate(model, sequences, values)
    estimate_seconds = time.perf_counter() - began
    pairs = _pairs(plan, values)
    began = time.perf_counter()
    losses = _evaluate(model, sequences, pairs, base_C, notify) if exact else None
    exact_seconds = base_seconds + time.perf_counter() - began if exact else None
    changes = _cell_changes(pairs, estimated, losses, labels_C, draws)
    return Sensitivity(
        plan=plan,
        num_sequences=sequences.num_sequences,
        documents=sequences.num_documents,
        loss=float(base_C.sum() / labels_C.sum()),
        changes=changes,
        estimate_seconds=estimate_seconds,
        exact_seconds=exact_seconds,
        evaluations=len(pairs) + 1 if exact else 0,
        agreement=agreements(changes) if exact else (),
    )


def _pairs(plan: SparsityPlan, values: Sequence[float]) -> list[tuple[Cell, int, float]]:
    """Every cell with every S that differs from its own, and the place of that S among the values."""
    return [
        (cell, place, value)
        for cell in cells_of(plan)
        for place, value in enumerate(values)
        if value != sparsity_of(plan, cell)
    ]


def _evaluate(
    model: Transformer,
    sequences: DocumentSequences,
    pairs: list[tuple[Cell, int, float]],
    base_C: Array,
    notify: Notify | None,
) -> list[Array]:
    plan, found = model.sparsity_plan, []
    try:
        for cell, _, value in pairs:
            model.set_sparsity(with_cells(plan, {cell: value}))
            found.append(loss_by_document(model, sequences) - base_C)
            if notify is not None:
                notify(len(found), len(pairs))
    finally:
        model.set_sparsity(plan)
    return found


def _cell_changes(
    pairs: list[tuple[Cell, int, float]], estimated: Estimate, losses: list[Array] | None, labels_C: Array, draws: int
) -> tuple[CellChange, ...]:
    total = labels_C.sum()
    first_PC = np.stack([estimated.first[cell][place] for cell, place, _ in pairs])
    both_PC = first_PC + np.stack([estimated.second[cell][place] for cell, place, _ in pairs])
    low_P, high_P = bootstrap_intervals(both_PC, labels_C, draws=draws)
    exact_PC = np.stack(losses) if losses is not None else None
    bounds = bootstrap_intervals(exact_PC, labels_C, draws=draws) if exact_PC is not None else None
    halves_P2 = _halves(exact_PC, labels_C) if exact_PC is not None else None
    return tuple(
        CellChange(
            cell=cell,
            sparsity=value,
            estimate=float(both_PC[i].sum() / total),
            estimate_interval=(float(low_P[i]), float(high_P[i])),
            first_order=float(first_PC[i].sum() / total),
            exact=None if exact_PC is None else float(exact_PC[i].sum() / total),
            exact_interval=None if bounds is None else (float(bounds[0][i]), float(bounds[1][i])),
            exact_halves=None if halves_P2 is None else (float(halves_P2[i, 0]), float(halves_P2[i, 1])),
        )
        for i, (cell, _, value) in enumerate(pairs)
    )


def _halves(sums_PC: Array, labels_C: Array) -> Array:
    """``(P, 2)``: the mean change over every other document, and over the rest; nan where there is one document."""
    with np.errstate(invalid="ignore"):
        return np.stack([sums_PC[:, part::2].sum(1) / labels_C[part::2].sum() for part in (0, 1)], axis=1)


def agreements(changes: Sequence[CellChange]) -> tuple[Agreement, ...]:
    """Over all points, then for each S by itself; of points that were evaluated."""
    values = sorted({change.sparsity for change in changes})
    groups: list[tuple[float | None, list[CellChange]]] = [(None, list(changes))]
    groups += [(value, [change for change in changes if change.sparsity == value]) for value in values]
    return tuple(_agreement(value, group) for value, group in groups if len(group) > 2)


def _agreement(sparsity: float | None, changes: Sequence[CellChange]) -> Agreement:
    exact = [change.exact for change in changes]
    both, first = [change.estimate for change in changes], [change.first_order for change in changes]
    halves = [change.exact_halves for change in changes if change.exact_halves is not None]
    has_halves = len(halves) == len(changes) and bool(np.isfinite(halves).all())
    decided = [change for change in changes if change.is_decided]
    return Agreement(
        sparsity=sparsity,
        points=len(changes),
        spearman=_spearman(both, exact),
        pearson=float(pearsonr(both, exact).statistic),
        spearman_first_order=_spearman(first, exact),
        spearman_halves=_spearman(*zip(*halves, strict=True)) if has_halves else None,
        decided=len(decided),
        spearman_decided=_spearman([change.estimate for change in decided], [change.exact for change in decided])
        if len(decided) > 2
        else None,
    )


def _spearman(ours: Sequence[float], theirs: Sequence[float | None]) -> float:
    return float(spearmanr(ours, theirs).statistic)
