"""The tensors and settings that decoders of the Llama lineage share: embedding, attention, norms, and head."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import (
    dense_hidden_size,
    has_experts,
    head_size,
    num_kv_heads,
    shared_hidden_size,
    vocab_size,
)
from qsparse_moe.interop.families.recipe import (
    Recipe,
    copied,
    fused_experts,
    joined,
    joined_vectors,
    stacked,
    transposed,
)
from qsparse_moe.interop.families.rotary import rotary_json, rotary_settings
from qsparse_moe.interop.families.settings import FamilySettings


@dataclass(frozen=True)
class ExpertNames:
    """Names of the stored tensors of a layer with experts, behind ``model.layers.N.``."""

    block: str
    """The module with the router and the experts, where each expert has tensors of its own."""
    fused_block: str
    """The same module where one tensor holds all experts."""
    gate: str
    up: str
    down: str
    shared: str | None = None
    """The shared expert within ``block``, which has a gate for its output."""


def model_settings(
    settings: FamilySettings, *, rope_theta: float, norm_epsilon: float, has_all_heads: bool = False
) -> dict[str, Any]:
    """Return the settings of ``ModelConfig`` outside of its sections.

    Args:
        settings: the settings of the ``config.json``.
        rope_theta: the default of the family.
        norm_epsilon: the default of the family.
        has_all_heads: whether a model of the family that does not say otherwise has keys and values for every head.
    """
    settings.require("hidden_act", "silu", "swish")
    settings.require("attention_dropout", 0.0)
    width, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    num_layers = settings.size("num_hidden_layers")
    settings.require("layer_types", None, ["full_attention"] * num_layers)
    return {
        "vocab_size": settings.size("vocab_size"),
        "hidden_size": width,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": settings.size("num_key_value_heads", default=heads if has_all_heads else None),
        "head_size": settings.size("head_dim", default=width // heads),
        "norm_epsilon": settings.number("rms_norm_eps", default=norm_epsilon),
        "tie_embeddings": settings.flag("tie_word_embeddings", default=False),
    } | rotary_settings(settings, rope_theta=rope_theta)


def attention_bias(settings: FamilySettings) -> dict[str, Any]:
    """Return our setting for a family in which one flag gives biases to all four projections."""
    return {"attention_bias": "all" if settings.flag("attention_bias", default=False) else "none"}


def expert_settings(settings: FamilySettings, hidden_size: str) -> dict[str, Any]:
    """Return the settings of the routed experts, whose hidden width is the setting ``hidden_size`` of the file."""
    renormalized = settings.flag("norm_topk_prob", default=False)
    return {
        "num_experts": settings.size("num_experts", "num_local_experts"),
        "experts_per_token": settings.size("num_experts_per_tok"),
        "expert_hidden_size": settings.size(hidden_size),
        "router": "softmax_topk_renormalized" if renormalized else "softmax_topk",
        "activation": "swiglu",
    }


def decoder_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a ``config.json`` that ``model_settings`` reads."""
    return {
        "vocab_size": vocab_size(config),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": num_kv_heads(config),
        "head_dim": head_size(config),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    } | rotary_json(config)


def attention_bias_json(config: ModelConfig) -> dict[str, Any]:
    """Return the setting of a ``config.json`` that ``attention_bias`` reads."""
    return {"attention_bias": config.attention_bias == "all"}


def expert_json(config: ModelConfig, hidden_size: str) -> dict[str, Any]:
    """Return the settings of a ``config.json`` that ``expert_settings`` reads."""
    return {
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        hidden_size: config.moe.expert_hidden_size,
        # A softmax over the chosen logits is the same function in another order.
        "norm_topk_prob": config.moe.router in ("softmax_topk_renormalized", "topk_softmax"),
    }


def decoder_recipes(
    config: ModelConfig,
    names: ExpertNames,
    stored: Collection[str],
    *,
    attention: Callable[[ModelConfig, str], dict[str, Recipe]] | None = None,
) -> dict[str, Recipe]:
    """Return the recipe of every tensor; experts are read fused where ``stored`` has such tensors.

    ``attention`` returns the recipes of the attention and the norms of a layer from the prefix of its names; None:
    those of grouped-query attention.
    """
    attention = attention or _attention
    width = config.hidden_size
    recipes = {
        "embedding.weight": copied("model.embed_tokens.weight", vocab_size(config), width),
        "final_norm.weight": copied("model.norm.weight", width),
    }
    if not config.tie_embeddings:
        recipes["head.weight"] = copied("lm_head.weight", vocab_size(config), width)
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        parts = attention(config, theirs)
        parts |= _experts(config, names, theirs, stored) if has_experts(config, layer) else _dense(config, theirs)
        recipes |= {f"{ours}.{name}": recipe for name, recipe in parts.items()}
    return recipes


def _attention(config: ModelConfig, layer: str) -> dict[str, Recipe]:
    width, channels = config.hidden_size, head_size(config)
    queries, keys = config.num_heads * channels, num_kv_heads(config) * channels
    prefix = f"{layer}.self_attn"
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    recipes = {
        "attention_norm.weight": copied(f"{layer}.input_layernorm.weight", width),
        "feed_forward_norm.weight": copied(f"{layer}.post_attention_layernorm.weight", width),
        "attention.qkv.weight": joined(width, {f"{prefix}.{name}.weight": size for name, size in rows.items()}),
        "attention.output.weight": copied(f"{prefix}.o_proj.weight", width, queries),
    }
    if config.attention_bias != "none":
        recipes["attention.qkv.bias"] = joined_vectors({f"{prefix}.{name}.bias": size for name, size in rows.items()})
    if config.attention_bias == "all":
        recipes["attention.output.bias"] = copied(f"{prefix}.o_proj.bias", width)
    if config.qk_norm != "none":
        together = config.qk_norm == "all_heads"
        recipes["attention.query_norm.weight"] = copied(f"{prefix}.q_norm.weight", queries if together else channels)
        recipes["attention.key_norm.weight"] = copied(f"{prefix}.k_norm.weight", keys if together else channels)
    return recipes


def _experts(config: ModelConfig, names: ExpertNames, layer: str, stored: Collection[str]) -> dict[str, Recipe]:
    experts, width, hidden = config.moe.num_experts, config.hidden_size, config.moe.expert_hidden_size
    is_fused = f"{layer}.{names.fused_block}.experts.gate_up_proj" in stored
    block = f"{layer}.{names.fused_block if is_fused else names.block}"
    if is_fused:
        recipes = fused_experts(f"{block}.experts", experts, width, hidden)
    else:
        recipes = {
            "w_gate": stacked(_expert_name(block, names.gate), experts, width, hidden),
            "w_up": stacked(_expert_name(block, names.up), experts, width, hidden),
            "w_down": stacked(_expert_name(block, names.down), experts, hidden, width),
        }
    found = {f"moe.experts.{name}": recipe for name, recipe in recipes.items()}
    found["moe.router.weight"] = copied(f"{block}.gate.weight", experts, width)
    return found | _shared(config, f"{block}.{names.shared}") if names.shared else found


def _shared(config: ModelConfig, expert: str) -> dict[str, Recipe]:
    recipes = _gated(expert, config.hidden_size, shared_hidden_size(config))
    recipes["token_gate"] = copied(f"{expert}_gate.weight", 1, config.hidden_size)
    return {f"moe.shared.{name}": recipe for name, recipe in recipes.items()}


def _expert_name(block: str, matrix: str) -> Callable[[int], str]:
    return lambda expert: f"{block}.experts.{expert}.{matrix}.weight"


def _dense(config: ModelConfig, layer: str) -> dict[str, Recipe]:
    recipes = _gated(f"{layer}.mlp", config.hidden_size, dense_hidden_size(config))
    return {f"dense.{name}": recipe for name, recipe in recipes.items()}


def _gated(block: str, width: int, hidden: int) -> dict[str, Recipe]:
    return {
        "w_gate": transposed(f"{block}.gate_proj.weight", width, hidden),
        "w_up": transposed(f"{block}.up_proj.weight", width, hidden),
        "w_down": transposed(f"{block}.down_proj.weight", hidden, width),
    }
