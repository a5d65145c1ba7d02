"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): a gated shared expert, and biases of queries, keys, and values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import shared_hidden_size
from qsparse_moe.interop.families.decoder import (
    ExpertNames,
    decoder_json,
    decoder_recipes,
    expert_json,
    expert_settings,
    model_settings,
)
from qsparse_moe.interop.families.dense_layers import dense_layers, dense_layers_json
from qsparse_moe.interop.families.recipe import Recipes
from qsparse_moe.interop.families.settings import FamilySettings

_EXPERTS = ExpertNames(
    block="mlp", fused_block="mlp", gate="gate_proj", up="up_proj", down="down_proj", shared="shared_expert"
)


def settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig``."""
    source.require("use_sliding_window", False)
    # Without use_sliding_window, transformers reads neither of them.
    source.ignore(("sliding_window", "max_window_layers"))
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-6)
    moe = expert_settings(source, "moe_intermediate_size") | dense_layers(source, model["num_layers"])
    shared = {
        "num_shared_experts": 1,
        "shared_expert_hidden_size": source.size("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }
    bias = "qkv" if source.flag("qkv_bias", default=True) else "none"
    return model | {"attention_bias": bias, "moe": moe | shared}


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json``."""
    settings = decoder_json(config) | expert_json(config, "moe_intermediate_size") | dense_layers_json(config)
    return settings | {
        "shared_expert_intermediate_size": shared_hidden_size(config),
        "qkv_bias": config.attention_bias == "qkv",
        "use_sliding_window": False,
        "sliding_window": None,
    }


def recipes(config: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor of the model from the tensors named ``stored``."""
    return decoder_recipes(config, _EXPERTS, stored)
