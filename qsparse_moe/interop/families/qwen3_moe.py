"""Qwen3-MoE (arXiv 2505.09388): norms of queries and keys per head, and some layers may be dense."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.families.decoder import ExpertNames, decoder_recipes, model_settings
from qsparse_moe.interop.families.recipe import Recipes
from qsparse_moe.interop.families.settings import FamilySettings

_EXPERTS = ExpertNames(block="mlp", fused_block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def settings(source: FamilySettings) -> dict[str, Any]:
    """Return the settings of ``ModelConfig``."""
    source.require("use_sliding_window", False)
    # Without use_sliding_window, transformers reads neither of them.
    source.ignore(("sliding_window", "max_window_layers"))
    model = model_settings(source, rope_theta=1e4, norm_epsilon=1e-6)
    renormalized = source.flag("norm_topk_prob", default=False)
    moe = {
        "num_experts": source.size("num_experts", "num_local_experts"),
        "experts_per_token": source.size("num_experts_per_tok"),
        "expert_hidden_size": source.size("moe_intermediate_size"),
        "router": "softmax_topk_renormalized" if renormalized else "softmax_topk",
        "activation": "swiglu",
    }
    return model | {"qk_norm": True, "moe": moe | _dense_layers(source, model["num_layers"])}


def recipes(config: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor of the model from the tensors named ``stored``."""
    return decoder_recipes(config, _EXPERTS, stored)


def _dense_layers(source: FamilySettings, num_layers: int) -> dict[str, Any]:
    """Return our settings for the layers that have a dense feed-forward network.

    Raises:
        CheckpointError: they are not the first ones and those between the multiples of an interval.
    """
    step, dense = source.size("decoder_sparse_step", default=1), source.layers("mlp_only_layers")
    hidden = source.size("intermediate_size")
    routed = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]
    if len(routed) == num_layers:
        return {}
    for interval in range(1, num_layers + 1):
        for first in (0, min(routed, default=num_layers)):
            ours = [layer for layer in range(first, num_layers) if (layer + 1) % interval == 0]
            if ours == routed:
                return {"num_dense_layers": first, "moe_layer_interval": interval, "dense_hidden_size": hidden}
    raise CheckpointError(
        f"{source.file}: mlp_only_layers ({show(sorted(dense))}) with decoder_sparse_step ({step}) leaves experts in "
        f"the layers {routed}, and this package's model has them, after the first model.moe.num_dense_layers, in every "
        "model.moe.moe_layer_interval-th layer; name a model with such layers"
    )
