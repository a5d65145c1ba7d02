"""Operations of one token's forward pass, counted: a multiplication and an addition are two.

H heads, C channels a head, S tokens of context, D features of a row.

``kept`` is what would be left if every zero were skipped; a dense kernel still multiplies ``routed``. Norms, rotations,
softmax and activations are left out; they are linear in the width.
"""

from __future__ import annotations

from dataclasses import dataclass

from qsparse_moe.accounting.parameters import kept_features, model_weights
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import head_size, layer_sites, site_width
from qsparse_moe.sparsity.plan import SparsityPlan


@dataclass(frozen=True)
class ForwardFlops:
    """Operations per token."""

    routed: int
    """Matrices, with A of E experts and no zero skipped, and attention scores."""
    kept: float
    """The same with only the rows that Q-Sparse keeps, and with the selection."""
    attention_scores: int
    """Queries times keys and weights times values, within both of the above."""
    selection: int
    """One magnitude and one comparison for every feature of every row that is selected from, within ``kept``: the
    least that a selection can take, not what a sort takes."""


def forward_flops(config: ModelConfig, context: int, plan: SparsityPlan | None = None) -> ForwardFlops:
    """Operations of one token that attends to ``context`` tokens.

    With ``context`` S this is the convention of MFU figures, which takes no discount for the causal mask.
    """
    plan = plan or SparsityPlan.from_config(config)
    matrices = [weight for weight in model_weights(config, plan) if weight.is_matrix]
    scores = config.num_layers * 4 * config.num_heads * head_size(config) * context
    selection = sum(_selection(config, plan, layer) for layer in range(config.num_layers))
    return ForwardFlops(
        routed=2 * sum(weight.active for weight in matrices) + scores,
        kept=2 * sum(weight.kept for weight in matrices) + scores + selection,
        attention_scores=scores,
        selection=selection,
    )


def _selection(config: ModelConfig, plan: SparsityPlan, layer: int) -> int:
    total = 0
    for site in layer_sites(config, layer):
        kept, width = kept_features(config, plan, layer, site), site_width(config, site)
        if min(kept) == width:
            continue
        # One selection serves all experts of a token where their K is the same (moe/layer.py).
        per_expert = site == "expert_hidden" or len(set(kept)) > 1
        total += 2 * width * (config.moe.experts_per_token if per_expert else 1)
    return total
