"""The change of the validation loss when one layer uses other ranks of choice, and joint plans against their estimate.

X values of S, C documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import pearsonr, spearmanr

from qsparse_moe.ablation.cells import cells_of, with_cells
from qsparse_moe.ablation.routing import Choice, RoutingCell, choices_of, with_all_ranks, with_choices
from qsparse_moe.ablation.sensitivity.change_figures import change_figures
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, loss_by_document
from qsparse_moe.ablation.sensitivity.estimate import Estimate
from qsparse_moe.ablation.sensitivity.joint import plan_terms
from qsparse_moe.ablation.sensitivity.measured_routing import with_measured_routing
from qsparse_moe.ablation.sensitivity.routed_layer import routed_layers
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.data.packing import Array
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan

_VALUES = tuple(round(0.05 * step, 2) for step in range(20))
_DRAWS = 3
_SPREAD = 0.3
_HIGHEST = 0.7


@dataclass(frozen=True)
class RoutingChange:
    """The change of the mean loss when one layer has another choice of ranks, in nats per token."""

    cell: RoutingCell
    estimate: float
    estimate_interval: tuple[float, float]
    first_order: float
    exact: float | None
    """The evaluated change; None if it was not evaluated."""
    exact_interval: tuple[float, float] | None
    exact_halves: tuple[float, float] | None


@dataclass(frozen=True)
class WithRouting:
    """The estimates of the same plans with the evaluated change of every choice of ranks that one layer may take."""

    estimated: tuple[float, ...]
    spearman: float
    pearson: float


@dataclass(frozen=True)
class PlanAgreement:
    """The estimates of whole random plans of both sparsities, and their evaluation, in nats per token."""

    estimated: tuple[float, ...]
    """Change of the loss against the plan of the model, from the passes alone."""
    evaluated: tuple[float, ...]
    spearman: float
    pearson: float
    with_routing: WithRouting | None = None
    """None in what earlier versions stored."""


def routing_changes(
    model: Transformer,
    sequences: DocumentSequences,
    estimated: Estimate,
    base_C: Array,
    *,
    exact: bool,
    draws: int,
) -> tuple[RoutingChange, ...]:
    """Return every change of ``estimated``, evaluated as well if ``exact``; ``base_C`` is the loss without any."""
    cells = list(estimated.first_routing)
    if not cells:
        return ()
    found = change_figures(
        np.stack([estimated.first_routing[cell] for cell in cells]),
        np.stack([estimated.second_routing[cell] for cell in cells]),
        np.stack([_loss_under(model, sequences, cell) - base_C for cell in cells]) if exact else None,
        sequences.labels_C,
        draws,
    )
    return tuple(RoutingChange(cell=cell, **figures) for cell, figures in zip(cells, found, strict=True))


def _loss_under(model: Transformer, sequences: DocumentSequences, cell: RoutingCell) -> Array:
    plan = model.sparsity_plan
    choices = choices_of(plan, model.config) | {cell.layer: cell.choice}
    try:
        # A plan cannot leave out a single rank, so the layers are combined as in the estimate.
        model.set_sparsity(with_all_ranks(plan))
        with routed_layers(model, choices):
            return loss_by_document(model, sequences)
    # Also after an interrupt: the caller keeps its model.
    finally:
        model.set_sparsity(plan)


def plan_agreement(
    model: Transformer, sequences: DocumentSequences, choices: Sequence[Choice], count: int, *, seed: int = 0
) -> PlanAgreement:
    """Evaluate ``count`` random plans of both sparsities and estimate each around the plan of the model.

    The estimates are made twice: from the passes alone, and with the evaluated change of every choice of ranks that
    one layer may take (``with_measured_routing``). S of every cell is drawn within 0.3 of a level between 0 and 0.7,
    and every layer has one of ``choices``. The plan of the model is the same after the call.
    """
    plan, layers = model.sparsity_plan, moe_layers(model.config)
    # The plan itself may have another choice.
    known = {layer: _with(choices, choice) for layer, choice in choices_of(plan, model.config).items()}
    terms = plan_terms(model, sequences, _VALUES, known, draws=_DRAWS)
    measured = with_measured_routing(terms, model, sequences)
    base, labels = loss_by_document(model, sequences).sum(), sequences.labels_C.sum()
    generator = np.random.default_rng(seed)
    estimated, with_routing, evaluated = [], [], []
    try:
        for _ in range(count):
            drawn = {layer: choices[int(generator.integers(len(choices)))] for layer in layers}
            there = with_choices(_random_cells(plan, generator), drawn)
            estimated.append(terms.change(there, drawn))
            with_routing.append(measured.change(there, drawn))
            model.set_sparsity(there)
            evaluated.append(float(loss_by_document(model, sequences).sum() - base) / labels)
    finally:
        model.set_sparsity(plan)
    return PlanAgreement(
        tuple(estimated),
        tuple(evaluated),
        *_correlations(estimated, evaluated),
        WithRouting(tuple(with_routing), *_correlations(with_routing, evaluated)),
    )


def _correlations(estimated: Sequence[float], evaluated: Sequence[float]) -> tuple[float, float]:
    return float(spearmanr(estimated, evaluated).statistic), float(pearsonr(estimated, evaluated).statistic)


def _with(choices: Sequence[Choice], choice: Choice) -> list[Choice]:
    return list(dict.fromkeys((*choices, choice)))


def _random_cells(plan: SparsityPlan, generator: np.random.Generator) -> SparsityPlan:
    cells, level = cells_of(plan), generator.uniform(0.0, _HIGHEST)
    drawn = np.clip(level + generator.uniform(-_SPREAD, _SPREAD, len(cells)), 0.0, _VALUES[-1])
    return with_cells(plan, dict(zip(cells, drawn.tolist(), strict=True)))
