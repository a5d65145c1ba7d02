"""Where a plan spends loss: the estimated change against the dense model, divided among cells and choices of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qsparse_moe.ablation.allocation.jointly import terms_around
from qsparse_moe.ablation.routing import Choice, choices_of
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.joint import PlanParts, PlanTerms
from qsparse_moe.ablation.sensitivity.measured_routing import with_measured_routing
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.sparsity.plan import SparsityPlan


@dataclass(frozen=True)
class LossSpent:
    """The loss that a plan adds to that of the dense model, in nats per token."""

    parts: PlanParts
    """The estimate, divided among the cells and the choices of ranks. What the choice of a layer changes alone is
    evaluated."""
    evaluated: float
    """The evaluated difference on the same sequences, with which the sum of the parts can be compared."""


def dense_terms(
    model: Transformer, sequences: DocumentSequences, dense: SparsityPlan, choices: Sequence[Choice]
) -> PlanTerms:
    """Return the terms around the dense model for plans with any of ``choices``.

    Around the dense model and not around a plan: for joint plans at 0.3, 0.4, and 0.5 of the bytes, evaluated at 0.064,
    0.022, and 0.018 nats, the estimates are 0.061, 0.033, and 0.019 from the dense model, and -0.14, -0.02, and 0.007
    from the plan back to it (docs/lab-log.md, 29 November).
    """
    return terms_around(model, sequences, dense, dict.fromkeys(moe_layers(model.config), choices))


def loss_spent(
    terms: PlanTerms, model: Transformer, sequences: DocumentSequences, plan: SparsityPlan, evaluated: float
) -> LossSpent:
    """Return the parts of the loss under ``plan``, from the terms around the dense model and one evaluation per layer.

    The evaluations are those of one layer alone with its choice of the plan: by the estimate, a layer without experts
    adds about a tenth of what it does.

    Args:
        terms: the terms around the dense model.
        model: the model of these terms, whose plan is the same after the call.
        sequences: the sequences on which they were made.
        plan: the plan.
        evaluated: the loss under the plan less that of the dense model, on the same sequences.
    """
    choices = choices_of(plan, model.config)
    measured = with_measured_routing(terms, model, sequences, only=choices)
    return LossSpent(measured.parts(plan, choices), evaluated)
