"""OLMoE (arXiv 2409.02060): experts in every layer, and norms over the queries and keys of all heads together."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.interop.families.decoder import (
    ExpertNames,
    attention_bias,
    attention_bias_json,
    decoder_json,
    decoder_recipes,
    expert_json,
    expert_settings,
    model_settings,
)
from qsparse_moe.interop.families.recipe import Recipes
from qsparse_moe.interop.families.settings import FamilySettings

_EXPERTS = ExpertNames(block="mlp", fused_block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig``."""
    source.require("clip_qkv", None)
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-5, has_all_heads=True) | attention_bias(source)
    return model | {"qk_norm": "all_heads", "moe": expert_settings(source, "intermediate_size")}


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json``."""
    settings = decoder_json(config) | attention_bias_json(config) | expert_json(config, "intermediate_size")
    return settings | {"clip_qkv": None}


def recipes(config: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor of the model from the tensors named ``stored``."""
    return decoder_recipes(config, _EXPERTS, stored)
