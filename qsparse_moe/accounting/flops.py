"""Operations of one token, counted: a multiplication and an addition are two.

H heads, C channels a head, S tokens of context, D features of a row, r the share of a site's features that are kept.

``kept`` is what would be left if every zero were skipped; a dense kernel still multiplies ``routed``. Norms, rotations,
softmax and activations are left out; they are linear in the width.

Training: a linear map has three products, forward, by its weight and by its input. Under the straight-through
estimator the gradient by the input is dense, so (2 r + 1) / 3 of the dense work is left; under the masked gradient r.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qsparse_moe.accounting.densities import Densities, kept_features
from qsparse_moe.accounting.parameters import Weight, model_weights
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import head_size, layer_sites, site_width
from qsparse_moe.sparsity.plan import SparsityPlan


@dataclass(frozen=True)
class Flops:
    """Operations per token."""

    routed: float
    """Matrices, with A of E experts and no zero skipped, and attention scores: what dense kernels execute, and what
    model FLOPs utilisation counts."""
    kept: float
    """The same with only the rows that Q-Sparse keeps, and with the selection: effective, not executed."""
    attention_scores: int
    """Queries times keys and weights times values, within both of the above."""
    selection: int
    """One magnitude and one comparison for every feature of every row that is selected from, within ``kept``: the
    least that a selection can take, not what a sort takes."""


def forward_flops(
    config: ModelConfig, context: int, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> Flops:
    """Operations of one token that attends to ``context`` tokens.

    With ``context`` S this is the convention of MFU figures, which takes no discount for the causal mask.

    Args:
        config: the model.
        context: tokens that it attends to.
        plan: None is that of the config.
        densities: measured shares of the features that are not zero, in place of the plan's K.
    """
    plan = plan or SparsityPlan.from_config(config)
    matrices = list(_matrices(config, plan, densities))
    scores = _scores(config, context)
    selection = sum(_selection(config, plan, layer) for layer in range(config.num_layers))
    return Flops(
        routed=2 * sum(weight.active for weight in matrices) + scores,
        kept=2 * sum(weight.kept for weight in matrices) + scores + selection,
        attention_scores=scores,
        selection=selection,
    )


def training_flops(
    config: ModelConfig, context: int, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> Flops:
    """Forward and backward of one token of a row of ``context``; recomputation is not counted.

    ``routed`` is 6 a weight and 6 H (C + C) S a layer for the scores. A blended gradient counts as straight-through.
    """
    plan = plan or SparsityPlan.from_config(config)
    forward = forward_flops(config, context, plan, densities=densities)
    masked = config.sparsity.gradient == "masked"
    by_input = sum(weight.kept if masked else weight.active for weight in _matrices(config, plan, densities))
    by_weight = forward.kept - forward.attention_scores - forward.selection
    return Flops(
        routed=3 * forward.routed,
        kept=forward.kept + by_weight + 2 * by_input + 2 * forward.attention_scores,
        attention_scores=3 * forward.attention_scores,
        selection=forward.selection,
    )


def flops_by_site(
    config: ModelConfig, context: int, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> dict[str, Flops]:
    """``forward_flops`` by what they go to: each site's matrices and selection, router, head, ``attention_scores``."""
    plan = plan or SparsityPlan.from_config(config)
    found: dict[str, Flops] = {}
    for weight in _matrices(config, plan, densities):
        name = weight.site or weight.part
        _add(found, name, Flops(2 * weight.active, 2 * weight.kept, 0, 0))
    for layer in range(config.num_layers):
        for site, selection in _selection_by_site(config, plan, layer):
            _add(found, site, Flops(0, selection, 0, selection))
    scores = _scores(config, context)
    return found | {"attention_scores": Flops(scores, scores, scores, 0)}


def _add(found: dict[str, Flops], name: str, more: Flops) -> None:
    one = found.get(name, Flops(0, 0, 0, 0))
    found[name] = Flops(
        one.routed + more.routed, one.kept + more.kept, one.attention_scores, one.selection + more.selection
    )


def _matrices(config: ModelConfig, plan: SparsityPlan, densities: Densities | None) -> Iterator[Weight]:
    return (weight for weight in model_weights(config, plan, densities=densities) if weight.is_matrix)


def _scores(config: ModelConfig, context: int) -> int:
    return config.num_layers * 4 * config.num_heads * head_size(config) * context


def _selection(config: ModelConfig, plan: SparsityPlan, layer: int) -> int:
    return sum(selection for _, selection in _selection_by_site(config, plan, layer))


def _selection_by_site(config: ModelConfig, plan: SparsityPlan, layer: int) -> Iterator[tuple[str, int]]:
    for site in layer_sites(config, layer):
        kept, width = kept_features(config, plan, layer, site), site_width(config, site)
        if min(kept) == width:
            continue
        # One selection serves all experts of a token where their K is the same (moe/layer.py).
        per_expert = site == "expert_hidden" or len(set(kept)) > 1
        yield site, 2 * width * (config.moe.experts_per_token if per_expert else 1)
