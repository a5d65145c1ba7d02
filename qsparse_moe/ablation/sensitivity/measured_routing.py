"""Terms of whole plans whose single changes of routing are evaluated in place of estimated.

The estimate of a layer without its experts, or without the first expert of every token, may be a tenth of what this
costs: the change is far beyond the reach of a second order. There are only few such changes, one per layer and choice,
so that all of them can be evaluated. The interactions of several changes remain estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qsparse_moe.ablation.routing import Choice, choices_of, with_choices
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, mean_loss
from qsparse_moe.ablation.sensitivity.joint import LayerTerms, PlanTerms
from qsparse_moe.model.transformer import Transformer


def with_measured_routing(
    terms: PlanTerms,
    model: Transformer,
    sequences: DocumentSequences,
    *,
    only: Mapping[int, Choice] | None = None,
) -> PlanTerms:
    """Return ``terms`` with the evaluated change of every choice of ranks that one layer alone may take.

    One evaluation per layer and choice. The plan of the model is the same after the call.

    Args:
        terms: the terms around a plan that leaves out no single rank.
        model: the model of these terms.
        sequences: the sequences on which they were made, or others.
        only: the one choice per layer whose change is needed; the others stay estimated.
    """
    base = mean_loss(model, sequences, terms.plan)
    layers = (_measured(layer, terms, model, sequences, base=base, only=only) for layer in terms.layers)
    return replace(terms, layers=tuple(layers))


def _measured(
    layer: LayerTerms,
    terms: PlanTerms,
    model: Transformer,
    sequences: DocumentSequences,
    *,
    base: float,
    only: Mapping[int, Choice] | None,
) -> LayerTerms:
    number = layer.cells[0].layer
    here = choices_of(terms.plan, model.config)
    if number not in here:
        return layer
    first_O = layer.routing_first_O.copy()
    for position, choice in enumerate(layer.choices):
        if choice == here[number] or choice is None or (only is not None and choice != only.get(number)):
            continue
        there = with_choices(terms.plan, here | {number: choice})
        change = (mean_loss(model, sequences, there) - base) * terms.num_labels
        # The other cells of the layer have no sums at their own S, so that this is all of the estimate.
        first_O[position] = change - terms.share * np.square(layer.routing_drawn_OQ[position]).sum()
    return replace(layer, routing_first_O=first_O)
