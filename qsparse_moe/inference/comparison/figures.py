"""The figures of a comparison for TensorBoard: scalars, heat maps of layers by experts, and curves by position.

L layers with experts, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from qsparse_moe.inference.comparison.continuations import ContinuationChange
from qsparse_moe.inference.comparison.measure import Comparison, LayerChange
from qsparse_moe.inference.comparison.run import ComparedModels
from qsparse_moe.metrics.evaluation import EvaluationFigures
from qsparse_moe.metrics.heatmaps import Scale
from qsparse_moe.metrics.names import layer_name


def comparison_figures(compared: ComparedModels) -> EvaluationFigures:
    """Return the figures by the names of ``metrics.names``, which start with ``comparison/``."""
    found = compared.comparison
    scalars = dict(_outputs(found)) | dict(_means(found))
    for layer in found.layers:
        scalars |= {layer_name(name, layer.layer): value for name, value in _by_layer(layer)}
    texts = found.continuations
    if texts is not None:
        scalars |= dict(_texts(texts))
    return EvaluationFigures(
        # Not what is absent or infinite, for which TensorBoard would draw a gap.
        {name: value for name, value in scalars.items() if math.isfinite(value)},
        maps=_maps(found),
        layers=compared.moe_layers,
        curves={} if texts is None else _curves(texts),
    )


def change_maps(found: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """Return two maps ``(L, E)``: the reference's choices of each expert that are lost, and those that are gained.

    Both are fractions of the reference's choices of the expert; nan for an expert without any.
    """
    routing = [layer.routing for layer in found.routed_layers if layer.routing is not None]
    chosen_LE = np.array([one.reference_choices_E for one in routing], dtype=float)
    chosen_LE[chosen_LE == 0] = np.nan
    lost_LE, gained_LE = (np.array([getattr(one, name) for one in routing]) for name in ("lost_E", "gained_E"))
    return lost_LE / chosen_LE, gained_LE / chosen_LE


def _outputs(found: Comparison) -> Iterator[tuple[str, float]]:
    yield "comparison/kl_divergence", found.outputs.kl_divergence
    yield "comparison/top1_agreement", found.outputs.top1_agreement


def _means(found: Comparison) -> Iterator[tuple[str, float]]:
    by_name: dict[str, list[float]] = {}
    for layer in found.layers:
        for name, value in _by_layer(layer):
            by_name.setdefault(name, []).append(value)
    for name, values in by_name.items():
        yield name, sum(values) / len(values)


def _by_layer(layer: LayerChange) -> Iterator[tuple[str, float]]:
    yield "comparison/hidden_error", layer.hidden.error
    yield "comparison/hidden_cosine", layer.hidden.cosine
    if layer.routing is not None and layer.local_routing is not None:
        yield "comparison/choices_changed", layer.routing.choices_changed
        yield "comparison/first_choice_changed", layer.routing.first_changed
        yield "comparison/choices_changed_locally", layer.local_routing.choices_changed


def _texts(texts: ContinuationChange) -> Iterator[tuple[str, float]]:
    yield "comparison/greedy_agreement", texts.agreement
    yield "comparison/never_parts", texts.never_parts
    yield "comparison/drift_agreement", texts.drift_agreement
    yield "comparison/drift_log_probability", texts.drift_log_probability


def _curves(texts: ContinuationChange) -> dict[str, list[tuple[int, float]]]:
    agreement = [(position, value) for position, value in enumerate(texts.agreement_by_position) if value is not None]
    return {
        "comparison/greedy_agreement": agreement,
        "comparison/drift_agreement": [(one.begin, one.agreement) for one in texts.drift],
        "comparison/drift_log_probability": [(one.begin, one.log_probability) for one in texts.drift],
    }


def _maps(found: Comparison) -> dict[str, tuple[Scale, np.ndarray]]:
    if not found.routed_layers:
        return {}
    lost_LE, gained_LE = change_maps(found)
    return {
        "comparison/choices_lost": (Scale(0.0, 1.0, "magma", "Choices of the reference that are lost"), lost_LE),
        "comparison/choices_gained": (
            Scale(0.0, 1.0, "magma", "Choices gained over those of the reference"),
            gained_LE,
        ),
    }
