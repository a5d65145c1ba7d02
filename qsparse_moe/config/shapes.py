"""Sizes derived from the settings: heads, hidden widths, and the width at every site. Imports no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from qsparse_moe.config.presets import PRESETS
from qsparse_moe.config.schema import SITES, ActivationFormat, ModelConfig, Site, SparsityConfig

EXPERT_SITES: frozenset[Site] = frozenset({"expert_input", "expert_hidden"})


BYTE_VOCABULARY = 257
"""Size of the byte vocabulary: 256 values and the document token."""


def padded_vocabulary(size: int) -> int:
    """Return the vocabulary size of the model for a tokenizer of ``size`` ids: the next multiple of 8."""
    return -(-size // 8) * 8


def vocab_size(config: ModelConfig) -> int:
    """Return the vocabulary size of the model. Unset, it is that of bytes; a run sets it by its tokenizer."""
    return config.vocab_size or padded_vocabulary(BYTE_VOCABULARY)


def head_size(config: ModelConfig) -> int:
    """Return C, the number of channels per head."""
    return config.head_size or config.hidden_size // config.num_heads


def num_kv_heads(config: ModelConfig) -> int:
    """Return the number of key and value heads."""
    return config.num_kv_heads or config.num_heads


class LatentSizes(NamedTuple):
    """The sizes of multi-head latent attention; see ``LatentAttentionConfig``."""

    key_value_rank: int
    query_rank: int | None
    nope_head_size: int
    rope_head_size: int
    value_head_size: int

    @property
    def query_head_size(self) -> int:
        """Number of channels per query and key head."""
        return self.nope_head_size + self.rope_head_size

    @property
    def cached_size(self) -> int:
        """Number of values per token and layer that generation stores: the vector of rank and the rotated key."""
        return self.key_value_rank + self.rope_head_size


def latent_sizes(config: ModelConfig) -> LatentSizes | None:
    """Return the sizes of latent attention; None if the model has ordinary attention."""
    latent = config.latent_attention
    if latent.key_value_rank is None:
        return None
    return LatentSizes(
        latent.key_value_rank,
        latent.query_rank,
        # A rule requires these three; 0 only keeps the other rules from failing where one of them is missing.
        latent.nope_head_size or 0,
        latent.rope_head_size or 0,
        latent.value_head_size or 0,
    )


def attended_size(config: ModelConfig) -> int:
    """Return the number of channels per head of the queries, keys, and values that attention multiplies."""
    latent = latent_sizes(config)
    # Both are padded to the larger one.
    return head_size(config) if latent is None else max(latent.query_head_size, latent.value_head_size)


def rotary_size(config: ModelConfig) -> int:
    """Return the number of rotated channels per head."""
    latent = latent_sizes(config)
    return latent.rope_head_size if latent else head_size(config)


def mixed_size(config: ModelConfig) -> int:
    """Return the width of the attention's result before its output projection: the value channels of all heads."""
    latent = latent_sizes(config)
    if latent:
        return config.num_heads * latent.value_head_size
    return config.num_heads * config.head_size if config.head_size else config.hidden_size


def cached_values(config: ModelConfig) -> int:
    """Return the number of values per token and layer that generation stores for attention."""
    latent = latent_sizes(config)
    return latent.cached_size if latent else 2 * num_kv_heads(config) * head_size(config)


def dense_hidden_size(config: ModelConfig) -> int:
    """Return the hidden width of the dense feed-forward networks."""
    # A dense layer is as wide as the experts of a token together, so that a token takes the same work in both.
    return config.moe.dense_hidden_size or config.moe.experts_per_token * config.moe.expert_hidden_size


def shared_hidden_size(config: ModelConfig) -> int:
    """Return the hidden width of all shared experts together; 0 if there are none."""
    moe = config.moe
    if not moe.num_shared_experts:
        return 0
    return moe.shared_expert_hidden_size or moe.num_shared_experts * moe.expert_hidden_size


def has_gate(config: ModelConfig) -> bool:
    """Return whether experts and dense feed-forward networks have a gate matrix in addition to up and down."""
    return config.moe.activation != "relu2"


def has_experts(config: ModelConfig, layer: int) -> bool:
    """Return whether ``layer``, counted from 0, has experts instead of a dense feed-forward network."""
    # Counted so that the last layer of every interval has the experts and the first one is dense.
    return layer >= config.moe.num_dense_layers and (layer + 1) % config.moe.moe_layer_interval == 0


def moe_layers(config: ModelConfig) -> tuple[int, ...]:
    """Return the layers with experts, counted from 0."""
    return tuple(layer for layer in range(config.num_layers) if has_experts(config, layer))


def layer_sites(config: ModelConfig, layer: int) -> tuple[Site, ...]:
    """Return the sites that exist in ``layer``, in the order of the forward pass."""
    attention: tuple[Site, ...] = ("attention_input", "attention_output")
    if not has_experts(config, layer):
        return *attention, "dense_input", "dense_hidden"
    shared: tuple[Site, ...] = ("shared_input", "shared_hidden") if config.moe.num_shared_experts else ()
    return *attention, "expert_input", "expert_hidden", *shared


def layers_with_site(config: ModelConfig, site: Site) -> tuple[int, ...]:
    """Return the layers, counted from 0, in which ``site`` exists."""
    return tuple(layer for layer in range(config.num_layers) if site in layer_sites(config, layer))


def model_sites(config: ModelConfig) -> tuple[Site, ...]:
    """Return the sites that exist in at least one layer."""
    existing = {site for layer in range(config.num_layers) for site in layer_sites(config, layer)}
    return tuple(site for site in SITES if site in existing)


def site_width(config: ModelConfig, site: Site) -> int:
    """Return the number of features at ``site``: the input width of the weight matrix behind it."""
    widths: dict[Site, int] = {
        "attention_output": mixed_size(config),
        "expert_hidden": config.moe.expert_hidden_size,
        "shared_hidden": shared_hidden_size(config),
        "dense_hidden": dense_hidden_size(config),
    }
    return widths.get(site, config.hidden_size)


def site_width_setting(config: ModelConfig, site: Site) -> str:
    """Return the setting, or the product of settings, that determines ``site_width``, for messages."""
    moe = config.moe
    attention = "model.num_heads * model.head_size" if config.head_size else "model.hidden_size"
    if latent_sizes(config):
        attention = "model.num_heads * model.latent_attention.value_head_size"
    names: dict[Site, str] = {
        "attention_output": attention,
        "expert_hidden": "model.moe.expert_hidden_size",
        "shared_hidden": "model.moe.shared_expert_hidden_size"
        if moe.shared_expert_hidden_size
        else "model.moe.num_shared_experts * model.moe.expert_hidden_size",
        "dense_hidden": "model.moe.dense_hidden_size"
        if moe.dense_hidden_size
        else "model.moe.experts_per_token * model.moe.expert_hidden_size",
    }
    return names.get(site, "model.hidden_size")


def site_sparsity(settings: SparsityConfig, site: Site) -> float:
    """Return S at ``site`` before overrides, without a plan file."""
    preset = PRESETS[settings.preset].sparsity.get(site) if settings.preset else None
    return _first(getattr(settings.sites, site), settings.default, preset, 0.0)


def site_format(settings: SparsityConfig, site: Site) -> ActivationFormat:
    """Return the number format of the activations at ``site``."""
    preset = PRESETS[settings.preset].formats.get(site) if settings.preset else None
    return _first(getattr(settings.quantization.sites, site), settings.quantization.activations, preset, "none")


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    # The operator `or` would pass over an S of 0.
    return next(value for value in values if value is not None)
