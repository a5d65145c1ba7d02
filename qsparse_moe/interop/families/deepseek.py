"""DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (2412.19437): latent attention, shared experts, first layers dense."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import (
    LatentSizes,
    dense_hidden_size,
    latent_sizes,
    mixed_size,
    moe_layers,
    shared_hidden_size,
)
from qsparse_moe.interop.families.decoder import ExpertNames, decoder_json, decoder_recipes
from qsparse_moe.interop.families.recipe import Recipe, Recipes, buffer, copied, joined, transposed
from qsparse_moe.interop.families.rotary import rotary_settings
from qsparse_moe.interop.families.settings import FamilySettings

_EXPERTS = ExpertNames(block="mlp", fused_block="mlp", gate="gate_proj", up="up_proj", down="down_proj")
_DISAGREEMENT = "DeepSeek's code and transformers compute different models from another value; name another model"
# Of training with DeepSeek's code, and of programs; transformers does not read them.
_WITHOUT_EFFECT = ("aux_loss_alpha", "auto_map", "ep_size", "pretraining_tp", "seq_aux")


def v2_settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig`` for DeepSeek-V2."""
    source.require("mlp_bias", False)
    source.require("scoring_func", "softmax")
    source.require("norm_topk_prob", False, reason=_DISAGREEMENT)
    moe: dict[str, Any] = {
        "num_experts": source.size("n_routed_experts", "num_experts", default=64),
        "experts_per_token": source.size("num_experts_per_tok"),
        "expert_hidden_size": source.size("moe_intermediate_size", default=1407),
        "num_shared_experts": source.size("n_shared_experts", default=2),
        "router": "softmax_topk",
        "router_scaling_factor": source.number("routed_scaling_factor", default=1.0),
    }
    if source.require("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy":
        groups = {"num_expert_groups": source.size("n_group"), "groups_per_token": source.size("topk_group")}
        # With one group there is no score of groups, and its setting must be the default.
        moe |= groups | ({"group_score": "max"} if groups["num_expert_groups"] > 1 else {})
    # Without groups, transformers reads neither of them.
    source.ignore(("n_group", "topk_group"))
    return _model_settings(source, moe, first_dense=0, dense_hidden_size=11008)


def v3_settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig`` for DeepSeek-V3.

    Its load-balancing biases become those of the router, with the rate of the paper: the rate decides whether there are
    any.
    """
    source.require("scoring_func", "sigmoid")
    source.require("topk_method", "noaux_tc")
    source.require("rope_interleave", True)
    # The layers of the multi-token prediction are left out; see ``left_out``.
    source.ignore(("num_nextn_predict_layers", "num_mtp_layers"))
    renormalized = source.flag("norm_topk_prob", default=True)
    moe = {
        "num_experts": source.size("n_routed_experts", "num_local_experts", default=256),
        "experts_per_token": source.size("num_experts_per_tok", default=8),
        "expert_hidden_size": source.size("moe_intermediate_size", default=2048),
        "num_shared_experts": source.size("n_shared_experts", default=1),
        "router": "sigmoid_topk_renormalized" if renormalized else "sigmoid_topk",
        "router_scaling_factor": source.number("routed_scaling_factor", default=2.5),
        "num_expert_groups": source.size("n_group", default=8),
        "groups_per_token": source.size("topk_group", default=4),
        "bias_update_rate": 0.001,
    }
    return _model_settings(source, moe, first_dense=3, dense_hidden_size=18432)


def v2_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json`` of DeepSeek-V2."""
    moe = config.moe
    return _model_json(config) | {
        "topk_method": "greedy" if moe.num_expert_groups == 1 else "group_limited_greedy",
        "n_group": moe.num_expert_groups,
        "topk_group": moe.groups_per_token,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    }


def v3_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of the ``config.json`` of DeepSeek-V3."""
    moe = config.moe
    return _model_json(config) | {
        "topk_method": "noaux_tc",
        "n_group": moe.num_expert_groups,
        "topk_group": moe.groups_per_token,
        "scoring_func": "sigmoid",
        "norm_topk_prob": moe.router == "sigmoid_topk_renormalized",
    }


def recipes(config: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor of the model from the tensors named ``stored``."""
    found = decoder_recipes(config, _EXPERTS, stored, attention=_attention)
    width, hidden = config.hidden_size, shared_hidden_size(config)
    for layer in moe_layers(config):
        theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}.moe"
        shared = f"{theirs}.shared_experts"
        found |= {
            f"{ours}.shared.w_gate": transposed(f"{shared}.gate_proj.weight", width, hidden),
            f"{ours}.shared.w_up": transposed(f"{shared}.up_proj.weight", width, hidden),
            f"{ours}.shared.w_down": transposed(f"{shared}.down_proj.weight", hidden, width),
        }
        if config.moe.bias_update_rate:
            bias = f"{theirs}.gate.e_score_correction_bias"
            found[f"{ours}.router.expert_bias"] = buffer(bias, config.moe.num_experts)
    return found


def left_out(config: ModelConfig, stored: Collection[str]) -> dict[str, str]:
    """Return the stored tensors that the model does not need, each with its purpose.

    They are the layers of DeepSeek-V3's multi-token prediction, which follow those of the model and contain a
    projection that no other layer has. transformers does not load them either.
    """
    layers = (name.split(".")[2] for name in stored if name.endswith(".eh_proj.weight"))
    prefixes = tuple(f"model.layers.{layer}." for layer in layers if int(layer) >= config.num_layers)
    return {name: "multi-token prediction" for name in stored if name.startswith(prefixes)} if prefixes else {}


def _model_settings(
    source: FamilySettings, moe: dict[str, Any], *, first_dense: int, dense_hidden_size: int
) -> dict[str, Any]:
    """Return the settings that both families share; the two last arguments are defaults of the family."""
    source.require("hidden_act", "silu", "swish")
    source.require("attention_bias", False)
    source.require("attention_dropout", 0.0)
    source.require("moe_layer_freq", 1, reason=_DISAGREEMENT)
    heads, layers = source.size("num_attention_heads"), source.size("num_hidden_layers")
    # There are no key and value heads: transformers only compares the two numbers.
    source.require("num_key_value_heads", heads)
    # transformers replaces them by sizes that follow from others.
    source.ignore(("head_dim", "qk_head_dim", *_WITHOUT_EFFECT))
    dense = min(source.count("first_k_dense_replace", default=first_dense), layers)
    hidden = source.size("intermediate_size", default=dense_hidden_size)
    moe |= {"activation": "swiglu"} | ({"num_dense_layers": dense, "dense_hidden_size": hidden} if dense else {})
    return {
        "vocab_size": source.size("vocab_size"),
        "hidden_size": source.size("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "norm_epsilon": source.number("rms_norm_eps", default=1e-6),
        "tie_embeddings": source.flag("tie_word_embeddings", default=False),
        "latent_attention": {
            "key_value_rank": source.size("kv_lora_rank", default=512),
            "query_rank": source.size_or_null("q_lora_rank", default=1536),
            "nope_head_size": source.size("qk_nope_head_dim", default=128),
            "rope_head_size": source.size("qk_rope_head_dim", default=64),
            "value_head_size": source.size("v_head_dim", default=128),
        },
        "moe": moe,
    } | rotary_settings(source, rope_theta=1e4, scales_scores=True)


def _model_json(config: ModelConfig) -> dict[str, Any]:
    moe, latent = config.moe, config.latent_attention
    settings = decoder_json(config)
    # Programs derive it from the sizes below, and in other ways than other families.
    del settings["head_dim"]
    return settings | {
        "num_key_value_heads": config.num_heads,
        "attention_bias": False,
        "intermediate_size": dense_hidden_size(config),
        "first_k_dense_replace": moe.num_dense_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_hidden_size,
        "n_shared_experts": shared_hidden_size(config) // moe.expert_hidden_size,
        "routed_scaling_factor": moe.router_scaling_factor,
        "kv_lora_rank": latent.key_value_rank,
        "q_lora_rank": latent.query_rank,
        "qk_nope_head_dim": latent.nope_head_size,
        "qk_rope_head_dim": latent.rope_head_size,
        "v_head_dim": latent.value_head_size,
    }


def _attention(config: ModelConfig, layer: str) -> dict[str, Recipe]:
    sizes, width, prefix = latent_sizes(config), config.hidden_size, f"{layer}.self_attn"
    assert sizes is not None, "every model of these families has latent attention"
    queries = config.num_heads * sizes.query_head_size
    up = config.num_heads * (sizes.nope_head_size + sizes.value_head_size)
    query = f"{prefix}.{'q_b_proj' if sizes.query_rank else 'q_proj'}.weight"
    latent = f"{prefix}.kv_a_proj_with_mqa.weight"
    orders = {
        query: _query_order(config.num_heads, sizes),
        latent: _halves_last(sizes.key_value_rank, sizes.rope_head_size),
    }
    recipes = {
        "attention_norm.weight": copied(f"{layer}.input_layernorm.weight", width),
        "feed_forward_norm.weight": copied(f"{layer}.post_attention_layernorm.weight", width),
        "attention.latent_norm.weight": copied(f"{prefix}.kv_a_layernorm.weight", sizes.key_value_rank),
        "attention.latent_up.weight": copied(f"{prefix}.kv_b_proj.weight", up, sizes.key_value_rank),
        "attention.output.weight": copied(f"{prefix}.o_proj.weight", width, mixed_size(config)),
    }
    first = (query, queries)
    if sizes.query_rank:
        first = (f"{prefix}.q_a_proj.weight", sizes.query_rank)
        recipes |= {
            "attention.query_latent_norm.weight": copied(f"{prefix}.q_a_layernorm.weight", sizes.query_rank),
            "attention.query_up.weight": joined(sizes.query_rank, {query: queries}, orders),
        }
    return recipes | {"attention.down.weight": joined(width, dict([first, (latent, sizes.cached_size)]), orders)}


def _halves_last(first: int, rotated: int) -> tuple[int, ...]:
    """Return the order of rows in which the last ``rotated`` ones, neighbours in pairs, become two halves.

    DeepSeek rotates channel 2i with channel 2i + 1, and this package i with i + R / 2. With the rows of queries and
    keys in this order both rotate the same pairs by the same angles, and no score depends on the order of channels.
    """
    return (*range(first), *range(first, first + rotated, 2), *range(first + 1, first + rotated, 2))


# The same in every layer, and 24,576 numbers in DeepSeek-V3.
@cache
def _query_order(heads: int, sizes: LatentSizes) -> tuple[int, ...]:
    order = _halves_last(sizes.nope_head_size, sizes.rope_head_size)
    return tuple(head * len(order) + row for head in range(heads) for row in order)
