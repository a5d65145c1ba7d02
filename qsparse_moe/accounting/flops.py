"""Count the floating-point operations per token; a multiplication and an addition are two operations.

H heads, C channels per head, S tokens of context, D features, r the share of a site's features that are selected.

``needed`` counts the operations that remain if every zero is skipped; a dense kernel executes ``routed``. Norms,
rotations, softmax and activations are not counted, because they grow with the width only linearly.

In training a linear map has three products: the forward pass, the gradient of its weight and the gradient of its input.
Under the straight-through estimator the gradient of the input is dense, so (2 r + 1) / 3 of the dense work remains;
under the masked gradient, r.

Latent attention is counted as training and prefill compute it, with the keys and values of every head. A decode step
multiplies queries and results instead of earlier keys and values (``model/latent_attention.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qsparse_moe.accounting.densities import Densities, planned_densities, selected_features
from qsparse_moe.accounting.parameters import Weight, model_weights
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import EXPERT_SITES, head_size, latent_sizes, layer_sites, site_width
from qsparse_moe.config.shared_selection_rules import gathers
from qsparse_moe.sparsity.plan import SparsityPlan

_GATHERED_PARTS = ("experts", "shared", "dense")


@dataclass(frozen=True)
class Flops:
    """Operations per token."""

    routed: float
    """Operations that the kernels execute: the matrices, with A of E experts and no zero skipped except by gathered
    products of shared features, and the attention scores. Model FLOPs utilisation counts these."""
    needed: float
    """Operations behind nonzero features, plus the selection itself: a count of useful work, not of work that dense
    kernels execute."""
    attention_scores: int
    """Operations of queries times keys and of attention weights times values; included in both of the above."""
    selection: int
    """Operations of the selection, included in ``needed``: one magnitude and one comparison per feature, the least that
    any selection needs; a sort takes more."""


def forward_flops(
    config: ModelConfig, context: int, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> Flops:
    """Return the operations of the forward pass for one token that attends to ``context`` tokens.

    With ``context`` S this is the convention of MFU figures, which do not subtract what the causal mask skips.

    Args:
        config: the model.
        context: number of tokens that the token attends to.
        plan: None is that of the config.
        densities: measured shares of the features that are not zero, in place of the plan's K.
    """
    plan = plan or SparsityPlan.from_config(config)
    densities = planned_densities(config, plan) if densities is None else densities
    matrices = list(_matrices(config, plan, densities))
    scores = _scores(config, context)
    selection = sum(_selection(config, plan, layer, densities) for layer in range(config.num_layers))
    return Flops(
        routed=2 * sum(_executed(config, weight) for weight in matrices) + scores,
        needed=2 * sum(weight.needed for weight in matrices) + scores + selection,
        attention_scores=scores,
        selection=selection,
    )


def training_flops(
    config: ModelConfig, context: int, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> Flops:
    """Return the operations of forward and backward for one token of a sequence of ``context`` tokens.

    Recomputation is not counted. ``routed`` is 6 per weight, plus 6 H (C + C) S per layer for the scores. A blended
    gradient counts as straight-through.
    """
    plan = plan or SparsityPlan.from_config(config)
    forward = forward_flops(config, context, plan, densities=densities)
    matrices = list(_matrices(config, plan, densities))
    return Flops(
        routed=2 * sum(_executed_in_training(config, weight) for weight in matrices) + 3 * forward.attention_scores,
        needed=2 * sum(_needed_in_training(config, weight) for weight in matrices)
        + forward.selection
        + 3 * forward.attention_scores,
        attention_scores=3 * forward.attention_scores,
        # The backward pass uses the masks of the forward pass and selects nothing itself.
        selection=forward.selection,
    )


def _executed(config: ModelConfig, weight: Weight) -> float:
    """Return the elements of a matrix that the forward pass of an evaluation multiplies with."""
    return weight.needed if _is_gathered(config, weight) else weight.active


def _needed_in_training(config: ModelConfig, weight: Weight, *, whole_columns: bool = False) -> float:
    """Return the elements that the three products of training need, added.

    Args:
        config: the model.
        weight: a matrix.
        whole_columns: with a shared selection, compute every hidden feature, as steps do that measure.
    """
    settings = config.sparsity
    masked = settings.gradient == "masked"
    # Hidden features outside of the set are computed if the set depends on them, or if they have a gradient.
    shrinks = masked and settings.shared.sets == "average" and not whole_columns
    forward = weight.by_rows if settings.selection == "shared" and weight.by_rows and not shrinks else weight.needed
    # The gradient of a weight has rows for the nonzero input features only, as the forward product has. The masked
    # gradient is zero wherever the feature was, so its rows of the weight are skipped in the gradient of the input too.
    return 2 * forward + (forward if masked else weight.active)


def _executed_in_training(config: ModelConfig, weight: Weight) -> float:
    if not _is_gathered(config, weight):
        return 3 * weight.active
    interval = config.sparsity.shared.measure_interval
    between, measuring = (_needed_in_training(config, weight, whole_columns=whole) for whole in (False, True))
    return ((interval - 1) * between + measuring) / interval


def _is_gathered(config: ModelConfig, weight: Weight) -> bool:
    return gathers(config) and weight.part in _GATHERED_PARTS


def flops_by_site(
    config: ModelConfig, context: int, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> dict[str, Flops]:
    """Return ``forward_flops`` by part: each site's matrices and selection, router, head, ``attention_scores``."""
    plan = plan or SparsityPlan.from_config(config)
    densities = planned_densities(config, plan) if densities is None else densities
    found: dict[str, Flops] = {}
    for weight in _matrices(config, plan, densities):
        name = weight.site or weight.part
        _add(found, name, Flops(2 * _executed(config, weight), 2 * weight.needed, 0, 0))
    for layer in range(config.num_layers):
        for site, selection in _selection_by_site(config, plan, layer, densities):
            _add(found, site, Flops(0, selection, 0, selection))
    scores = _scores(config, context)
    return found | {"attention_scores": Flops(scores, scores, scores, 0)}


def _add(found: dict[str, Flops], name: str, more: Flops) -> None:
    one = found.get(name, Flops(0, 0, 0, 0))
    # The attention scores have an entry of their own, which the caller adds, so they are 0 in all of these.
    found[name] = Flops(
        one.routed + more.routed, one.needed + more.needed, one.attention_scores, one.selection + more.selection
    )


def _matrices(config: ModelConfig, plan: SparsityPlan, densities: Densities | None) -> Iterator[Weight]:
    return (weight for weight in model_weights(config, plan, densities=densities) if weight.is_matrix)


def _scores(config: ModelConfig, context: int) -> int:
    # Two products per head, of queries with keys and of attention weights with values, take two operations per element
    # each.
    latent = latent_sizes(config)
    channels = latent.query_head_size + latent.value_head_size if latent else 2 * head_size(config)
    return config.num_layers * 2 * config.num_heads * channels * context


def _selection(config: ModelConfig, plan: SparsityPlan, layer: int, densities: Densities) -> int:
    return sum(selection for _, selection in _selection_by_site(config, plan, layer, densities))


def _selection_by_site(
    config: ModelConfig, plan: SparsityPlan, layer: int, densities: Densities
) -> Iterator[tuple[str, int]]:
    for site in layer_sites(config, layer):
        counts, width = selected_features(config, plan, layer, site), site_width(config, site)
        # A site that selects every feature compares nothing, and sets that tokens share are chosen once for all.
        if min(counts) == width or config.sparsity.selection == "shared":
            continue
        # One selection serves all experts of a token where their K is the same (moe/layer.py).
        per_expert = site == "expert_hidden" or len(set(counts)) > 1
        experts = densities.experts(config, layer) if site in EXPERT_SITES else 1
        yield site, round(2 * width * (experts if per_expert else min(1, experts)))
