"""Qwen3-MoE (arXiv 2505.09388): norms of queries and keys per head, and some layers may be dense."""

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
from qsparse_moe.interop.families.dense_layers import dense_layers, dense_layers_json
from qsparse_moe.interop.families.recipe import Recipes
from qsparse_moe.interop.families.settings import FamilySettings

_EXPERTS = ExpertNames(block="mlp", fused_block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig``."""
    source.require("use_sliding_window", False)
    # Without use_sliding_window, transformers reads neither of them.
    source.ignore(("sliding_window", "max_window_layers"))
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-6) | attention_bias(source)
    moe = expert_settings(source, "moe_intermediate_size") | dense_layers(source, model["num_layers"])
    return model | {"qk_norm": "per_head", "moe": moe}


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json``."""
    settings = decoder_json(config) | attention_bias_json(config) | expert_json(config, "moe_intermediate_size")
    return settings | dense_layers_json(config) | {"use_sliding_window": False, "sliding_window": None}


def recipes(config: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor of the model from the tensors named ``stored``."""
    return decoder_recipes(config, _EXPERTS, stored)
