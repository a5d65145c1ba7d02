"""Mixtral (arXiv 2401.04088): experts in every layer, a softmax over the logits of the chosen ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.interop.families.decoder import ExpertNames, decoder_json, decoder_recipes, model_settings
from qsparse_moe.interop.families.recipe import Recipes
from qsparse_moe.interop.families.settings import FamilySettings

_EXPERTS = ExpertNames(block="block_sparse_moe", fused_block="mlp", gate="w1", up="w3", down="w2")


def settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig``."""
    source.require("attention_bias", False)
    source.require("sliding_window", None)
    # Only training has the jitter, which multiplies the experts' input too; ours is at the router alone.
    source.require("router_jitter_noise", 0.0)
    moe = {
        "num_experts": source.size("num_local_experts", "num_experts"),
        "experts_per_token": source.size("num_experts_per_tok"),
        "expert_hidden_size": source.size("intermediate_size"),
        "router": "softmax_topk_renormalized",
        "activation": "swiglu",
    }
    return model_settings(source, rope_theta=1e6, norm_epsilon=1e-5) | {"moe": moe}


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json``."""
    return decoder_json(config) | {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        "intermediate_size": config.moe.expert_hidden_size,
        "sliding_window": None,
    }


def recipes(config: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor of the model from the tensors named ``stored``."""
    return decoder_recipes(config, _EXPERTS, stored)
