"""Measure the change of the validation loss when a single cell gets another S.

The exact change takes one evaluation per cell and S; ``estimate.py`` estimates all changes at once. C documents.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.routing import routing_choices
from qsparse_moe.ablation.sensitivity.change_figures import change_figures
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, loss_by_document, validation_documents
from qsparse_moe.ablation.sensitivity.estimate import Estimate, estimate
from qsparse_moe.ablation.sensitivity.routing_changes import (
    PlanAgreement,
    RoutingChange,
    plan_agreement,
    routing_changes,
)
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.data.loader import load_data
from qsparse_moe.data.packing import Array
from qsparse_moe.data.tokenizer import meaningless_ids
from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.trained_model import load_trained
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.evaluate import stored_timeout

logger = logging.getLogger(__name__)
DEFAULT_VALUES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9)
Notify = Callable[[int, int], None]
"""A callback that receives the number of evaluations done and their total."""


@dataclass(frozen=True)
class CellChange:
    """The change of the mean loss when one cell has another S than in the plan, in nats per token."""

    cell: Cell
    sparsity: float
    estimate: float
    estimate_interval: tuple[float, float]
    first_order: float
    """The first-order term of the estimate."""
    exact: float | None
    """The evaluated change; None if it was not evaluated."""
    exact_interval: tuple[float, float] | None
    exact_halves: tuple[float, float] | None
    """The exact change over every second document, and over the other documents."""

    @property
    def is_decided(self) -> bool:
        """Return whether the change was evaluated and its interval excludes 0."""
        return self.exact_interval is not None and not self.exact_interval[0] <= 0 <= self.exact_interval[1]


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of the estimate with the evaluation, and of the evaluation with itself."""

    sparsity: float | None
    """The S of the changes compared; None means all of them."""
    points: int
    """Number of changes compared."""
    spearman: float
    pearson: float
    spearman_first_order: float
    """Spearman correlation of the first-order term alone."""
    spearman_halves: float | None
    """Spearman correlation of the exact changes over one half of the documents with those over the other half.

    Where it is low, the ranks are noise and no estimate can rank better; more sequences help. None if there is only one
    document.
    """
    decided: int
    """Number of changes whose interval excludes 0."""
    spearman_decided: float | None
    """Spearman correlation over the decided changes alone; None if there are fewer than three."""


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivities of all cells of a model around one plan."""

    plan: SparsityPlan
    num_sequences: int
    documents: int
    loss: float
    """Loss under the plan itself, in nats per token."""
    changes: tuple[CellChange, ...]
    estimate_seconds: float
    exact_seconds: float | None
    evaluations: int
    """Number of forward passes over the sequences for the exact changes, including the one under the plan itself."""
    agreement: tuple[Agreement, ...]
    routing: tuple[RoutingChange, ...] = ()
    """Every MoE layer with other ranks of choice."""
    plans: PlanAgreement | None = None
    """Random plans of both sparsities; None if none were asked for."""

    @property
    def times_cheaper(self) -> float | None:
        """Return the seconds of all evaluations divided by those of the estimate."""
        return None if self.exact_seconds is None else self.exact_seconds / self.estimate_seconds


def load_ranked(
    folder: Path,
    distributed: Distributed,
    sparsity: float | None,
    overrides: Sequence[str] = (),
    shard: bool | None = None,
) -> tuple[RunConfig, Transformer, int]:
    """Load the model of a run, a checkpoint, or an export, with its own plan or with one S in every cell.

    All ranks must call it together, and ``shard`` says whether they divide the weights among them.

    Raises:
        ConfigError: the model selects by a threshold, or its router reads sparse tokens.
        CheckpointError: as ``load_trained``.
    """
    config, model, step = load_trained(
        folder, distributed.device, overrides=overrides, distributed=distributed, shard=shard
    )
    check_ranks(config.model)
    if sparsity is not None:
        # S alone: the experts per token stay those of the run.
        model.set_sparsity(model.sparsity_plan.with_(sparsity=sparsity))
    return config, model, step


def check_ranks(config: ModelConfig) -> None:
    """Raise ConfigError unless S of a cell is the share of features that its ranking drops."""
    selection = config.sparsity.selection
    if selection not in ("topk", "block"):
        raise ConfigError(
            f"model.sparsity.selection ({selection}) must be topk or block for sensitivities, which change K of "
            "one cell at a time; train the run, or a copy of its config, with one of these"
        )
    if config.moe.router_input == "sparse":
        raise ConfigError(
            "model.moe.router_input (sparse) must be dense for sensitivities: if one expert has another S, there "
            "is no single sparse token that the router could read; train a copy of the config with router_input=dense"
        )


def measure_run(
    folder: Path,
    values: Sequence[float] = DEFAULT_VALUES,
    *,
    sparsity: float | None = None,
    exact: bool = True,
    num_plans: int = 0,
    num_sequences: int | None = None,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    shard: bool | None = None,
    notify: Notify | None = None,
) -> tuple[Sensitivity, int]:
    """Measure the sensitivities of a trained model on its validation sequences; return them and the number of steps.

    Any number of ranks can call it together: they take the batches in turn, and all of them return the same figures.

    Args:
        folder: a run, whose newest checkpoint is used, one checkpoint, or an export.
        values: as in ``measure``.
        sparsity: the S of the other cells; None is that of the run.
        exact: as in ``measure``.
        num_plans: as in ``measure``.
        num_sequences: number of validation sequences; None is ``training.evaluation_rows``.
        device: ``cpu`` or ``cuda``.
        overrides: settings of the data in place of the run's.
        shard: whether the ranks divide the weights among them; None: as they did in training.
        notify: as in ``measure``.

    Raises:
        ConfigError, CheckpointError, DataError: as ``load_ranked`` and ``load_data`` do.
    """
    with open_distributed(device, timeout=stored_timeout(folder)) as distributed:
        config, model, step = load_ranked(folder, distributed, sparsity, overrides, shard)
        data = load_data(config.data)
        # The logits of ids that no text contains must not enter the loss; evaluate hides them too.
        model.hide_ids(meaningless_ids(config.model, data.tokenizer))
        sequences = validation_documents(
            data,
            num_sequences=num_sequences or config.training.evaluation_rows,
            batch_size=config.training.micro_batch_size,
            distributed=distributed,
        )
        return measure(model, sequences, values, exact=exact, num_plans=num_plans, notify=notify), step


def measure(
    model: Transformer,
    sequences: DocumentSequences,
    values: Sequence[float] = DEFAULT_VALUES,
    *,
    exact: bool = True,
    draws: int = 1000,
    num_plans: int = 0,
    notify: Notify | None = None,
) -> Sensitivity:
    """Measure the sensitivities of every cell around the plan of the model.

    The plan of the model is the same after the call.

    Args:
        model: a model that selects by rank, on any device.
        sequences: the sequences on which both the estimate and the exact changes are measured.
        values: the values of S that each cell takes in turn; the S of the plan itself is left out.
        exact: whether to evaluate every change as well.
        draws: number of bootstrap resamples over documents.
        num_plans: number of random plans of both sparsities to evaluate and estimate as a whole.
        notify: called after each evaluation.
    """
    plan, labels_C = model.sparsity_plan, sequences.labels_C
    # A site at S = 0 needs no groups that divide its width, and the values to try may be the first ones above 0.
    SparsityPlan.uniform(model.config, max(values)).check_fits(model.config)
    # This pass comes first, so that neither timing below includes one-time costs such as allocation and compilation.
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
        routing=routing_changes(model, sequences, estimated, base_C, exact=exact, draws=draws),
        plans=plan_agreement(model, sequences, routing_choices(model.config), num_plans) if num_plans else None,
    )


def _pairs(plan: SparsityPlan, values: Sequence[float]) -> list[tuple[Cell, int, float]]:
    """Return every cell with every S that differs from its own, and the index of that S in ``values``."""
    return [
        (cell, index, value)
        for cell in cells_of(plan)
        for index, value in enumerate(values)
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
            # The intervals are those of differences within a document, whose variance is far below that of the losses.
            found.append(loss_by_document(model, sequences) - base_C)
            if notify is not None:
                notify(len(found), len(pairs))
    # Also after an interrupt: the caller keeps its model.
    finally:
        model.set_sparsity(plan)
    return found


def _cell_changes(
    pairs: list[tuple[Cell, int, float]], estimated: Estimate, losses: list[Array] | None, labels_C: Array, draws: int
) -> tuple[CellChange, ...]:
    found = change_figures(
        np.stack([estimated.first[cell][index] for cell, index, _ in pairs]),
        np.stack([estimated.second[cell][index] for cell, index, _ in pairs]),
        np.stack(losses) if losses is not None else None,
        labels_C,
        draws,
    )
    return tuple(
        CellChange(cell=cell, sparsity=value, **figures) for (cell, _, value), figures in zip(pairs, found, strict=True)
    )


def agreements(changes: Sequence[CellChange]) -> tuple[Agreement, ...]:
    """Return the agreement over all evaluated changes, then for each S separately."""
    values = sorted({change.sparsity for change in changes})
    groups: list[tuple[float | None, list[CellChange]]] = [(None, list(changes))]
    groups += [(value, [change for change in changes if change.sparsity == value]) for value in values]
    # Two changes are always perfectly correlated.
    return tuple(_agreement(value, group) for value, group in groups if len(group) > 2)


def _agreement(sparsity: float | None, changes: Sequence[CellChange]) -> Agreement:
    exact = [change.exact for change in changes]
    both, first = [change.estimate for change in changes], [change.first_order for change in changes]
    # With a single document the second half is empty and its mean is nan.
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
