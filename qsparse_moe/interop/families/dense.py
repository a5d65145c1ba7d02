"""Families without experts: Llama (arXiv 2302.13971), Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import dense_hidden_size
from qsparse_moe.interop.families.decoder import (
    ExpertNames,
    attention_bias,
    attention_bias_json,
    decoder_json,
    decoder_recipes,
    model_settings,
)
from qsparse_moe.interop.families.recipe import Recipes
from qsparse_moe.interop.families.settings import FamilySettings

# Without experts no name is read but those of the dense layers, which all of these families have in common.
_NO_EXPERTS = ExpertNames(block="mlp", fused_block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def llama_settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig`` for Llama."""
    source.require("mlp_bias", False)
    # Another value splits the products, in another order of the sums.
    source.require("pretraining_tp", 1)
    source.require("rope_interleaved", False)
    # Of other programs; transformers reads none of them.
    source.ignore(("is_llama_config", "max_sequence_length", "transformers.js_config"))
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-6, has_all_heads=True)
    return model | attention_bias(source) | _all_dense(source, model)


def mistral_settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig`` for Mistral, whose sliding window must never be full."""
    source.require("attention_bias", False)
    # transformers' default is a window of 4096, where the setting is absent; a null is none.
    window = source.size_or_null("sliding_window", default=4096)
    longest = source.max_length or 4096 * 32
    if window is not None and window < longest:
        raise source.refusal(
            "sliding_window",
            f"must be null or at least max_position_embeddings ({longest}): attention has no window here",
            f"up to {window} tokens the window changes nothing, so set max_position_embeddings to {window} for a model "
            "that is used no longer than that",
        )
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-6)
    return model | _all_dense(source, model)


def qwen2_settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig`` for Qwen1.5, Qwen2, and Qwen2.5."""
    _without_window(source)
    source.require("use_mrope", False)
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-6)
    return model | {"attention_bias": "qkv"} | _all_dense(source, model)


def qwen3_settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig`` for Qwen3."""
    _without_window(source)
    # The default is not hidden_size / num_attention_heads.
    size = source.size("head_dim", default=128)
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-6) | attention_bias(source)
    return model | {"qk_norm": "per_head", "head_size": size} | _all_dense(source, model)


def llama_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json`` of Llama."""
    return _dense_json(config) | attention_bias_json(config) | {"mlp_bias": False}


def mistral_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json`` of Mistral."""
    return _dense_json(config) | {"sliding_window": None}


def qwen2_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json`` of Qwen2."""
    return _dense_json(config) | {"use_sliding_window": False, "sliding_window": None}


def qwen3_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json`` of Qwen3."""
    return qwen2_json(config) | attention_bias_json(config)


def recipes(config: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor of the model from the tensors named ``stored``."""
    return decoder_recipes(config, _NO_EXPERTS, stored)


def _without_window(source: FamilySettings) -> None:
    source.require("use_sliding_window", False)
    # Without use_sliding_window, transformers reads neither of them.
    source.ignore(("sliding_window", "max_window_layers"))


def _dense_json(config: ModelConfig) -> dict[str, Any]:
    return decoder_json(config) | {"intermediate_size": dense_hidden_size(config)}


def _all_dense(source: FamilySettings, model: dict[str, Any]) -> dict[str, Any]:
    """Return the section of the experts, of which no layer has any."""
    hidden = source.size("intermediate_size")
    return {
        "moe": {"num_dense_layers": model["num_layers"], "dense_hidden_size": hidden, "activation": "swiglu"},
    }
