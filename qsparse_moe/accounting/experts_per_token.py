"""Experts per token of every layer as the settings plan them, for figures that do not depend on zeros."""

from __future__ import annotations

import functools

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import scheduled_scale


@functools.lru_cache(maxsize=64)
def planned_experts(config: ModelConfig) -> dict[int, int]:
    """Return the largest number of experts of a token by MoE layer at the end of the schedule."""
    plan = SparsityPlan.from_config(config)
    return {layer: plan.experts(layer, config.moe.experts_per_token) for layer in moe_layers(config)}


def most_experts(config: ModelConfig) -> dict[int, int]:
    """Return the largest number of experts of a token by MoE layer in any step of the run."""
    if scheduled_scale(config.sparsity.schedule, 0) < 1.0:
        # A schedule begins with all experts of the model.
        return dict.fromkeys(moe_layers(config), config.moe.experts_per_token)
    return planned_experts(config)
