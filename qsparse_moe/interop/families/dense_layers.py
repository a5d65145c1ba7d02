"""Layers without experts, which the Qwen families list one by one or leave between those of an interval."""

from __future__ import annotations

from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import dense_hidden_size, has_experts
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.families.settings import FamilySettings


def dense_layers(source: FamilySettings, num_layers: int) -> dict[str, Any]:
    """Return our settings for the layers of a Qwen model that have a dense feed-forward network.

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


def dense_layers_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a ``config.json`` that ``dense_layers`` reads."""
    return {
        "intermediate_size": dense_hidden_size(config),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(config.num_layers) if not has_experts(config, layer)],
    }
