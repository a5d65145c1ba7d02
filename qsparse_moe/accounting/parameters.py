"""Count a model's parameters: all, those active by routing, and those needed after routing and Q-Sparse together.

D width, F expert width, H heads, C channels per head, E experts, A experts per token, K selected features, V ids.

A weight matrix behind a site counts ``K / width`` of its rows, because the others are multiplied with zero. The gate
(if any), up and down matrices count A of E experts, or as many as the plan gives the layer. Routers, norms, the biases
of attention and the head count whole. A token uses one row of the embedding, and a tied head is not stored a second
time. The biases that balance the experts (``model.moe.bias_update_rate``) have no gradient and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qsparse_moe.accounting.densities import Densities, planned_densities
from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.config.shapes import (
    dense_hidden_size,
    has_experts,
    has_gate,
    head_size,
    latent_sizes,
    mixed_size,
    num_kv_heads,
    shared_hidden_size,
    vocab_size,
)
from qsparse_moe.sparsity.plan import SparsityPlan


@dataclass(frozen=True)
class Weight:
    """One parameter of the model and how much of it a token uses."""

    name: str
    """Its key in the state dict."""
    part: str
    """The part of the model: embedding, attention, router, experts, shared, dense, norms or head."""
    stored: int
    """Number of elements in a checkpoint."""
    active: int
    """Number of elements that a token uses by routing; the nearest to the mean if tokens differ."""
    needed: float
    """Number of active elements whose input is not zero; if K differs between experts, at equal load."""
    is_matrix: bool
    """Whether a token is multiplied with it, which excludes norms, biases, and the embedding."""
    layer: int = -1
    """Layer of a weight behind a site, else -1."""
    site: Site | None = None
    """Site whose features are multiplied with its rows; None: Q-Sparse does not affect it."""
    by_rows: float = 0.0
    """``needed`` without regard to outputs that nothing reads; it differs only where tokens share hidden features."""


@dataclass(frozen=True)
class ParameterCount:
    """Sums over weights: of the model, or of one part of it."""

    stored: int
    active: int
    needed: float

    @classmethod
    def of(cls, weights: list[Weight]) -> ParameterCount:
        """Return the sums over ``weights``."""
        return cls(sum(w.stored for w in weights), sum(w.active for w in weights), sum(w.needed for w in weights))


def count_parameters(
    config: ModelConfig, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> ParameterCount:
    """Return the parameters of the whole model under ``plan`` (None: that of the config), or at ``densities``."""
    return ParameterCount.of(list(model_weights(config, plan, densities=densities)))


def count_by_part(
    config: ModelConfig, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> dict[str, ParameterCount]:
    """Return the same by part, in the order in which a token passes them; a part that the model lacks is left out."""
    parts: dict[str, list[Weight]] = {}
    for weight in model_weights(config, plan, densities=densities):
        parts.setdefault(weight.part, []).append(weight)
    return {part: ParameterCount.of(weights) for part, weights in parts.items()}


def count_with_embedding(
    config: ModelConfig, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> ParameterCount:
    """Return ``count_parameters`` with the whole embedding active, as most published figures count it.

    A tied head is the same table and is counted once.
    """
    counted = count_parameters(config, plan, densities=densities)
    table = vocab_size(config) * config.hidden_size
    # The count above has one row of the embedding, and a tied head whole.
    not_counted = -config.hidden_size if config.tie_embeddings else table - config.hidden_size
    return ParameterCount(counted.stored, counted.active + not_counted, counted.needed + not_counted)


def model_weights(
    config: ModelConfig, plan: SparsityPlan | None = None, *, densities: Densities | None = None
) -> Iterator[Weight]:
    """Yield every parameter of the model; a tied head is listed with nothing stored."""
    densities = densities or planned_densities(config, plan)
    width, table = config.hidden_size, vocab_size(config) * config.hidden_size
    yield Weight("embedding.weight", "embedding", table, width, width, is_matrix=False)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        yield _norm(f"{prefix}attention_norm.weight", width)
        yield from _attention(config, densities, layer)
        yield _norm(f"{prefix}feed_forward_norm.weight", width)
        yield from _feed_forward(config, densities, layer)
    yield _norm("final_norm.weight", width)
    # A tied head is the table of the embedding, which is stored above, but a token is multiplied with it.
    yield Weight("head.weight", "head", 0 if config.tie_embeddings else table, table, table, is_matrix=True)


def _mean(shares: tuple[float, ...]) -> float:
    # Over experts with different K this is the mean at even load, since the experts of a token are not known before.
    return sum(shares) / len(shares)


def _mean_product(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Return the mean over the experts; a tuple with one entry is that of all experts."""
    length = max(len(one), len(other))
    pairs = zip(one * (length // len(one)), other * (length // len(other)), strict=True)
    return sum(a * b for a, b in pairs) / length


def _norm(name: str, size: int) -> Weight:
    return Weight(name, "norms", size, size, size, is_matrix=False)


def _router(name: str, size: int) -> Weight:
    """Return a router, or the gate of the shared experts: both read dense tokens, so no site reduces them."""
    return Weight(name, "router", size, size, size, is_matrix=True)


def _attention(config: ModelConfig, densities: Densities, layer: int) -> Iterator[Weight]:
    if latent_sizes(config):
        yield from _latent_attention(config, densities, layer)
        return
    prefix, width, channels = f"layers.{layer}.attention.", config.hidden_size, head_size(config)
    # With a head size of its own, attention may be wider or narrower than the model.
    mixed = config.num_heads * channels
    qkv = width * (mixed + 2 * num_kv_heads(config) * channels)
    sites: dict[str, tuple[Site, int]] = {
        "qkv": ("attention_input", qkv),
        "output": ("attention_output", mixed * width),
    }
    for name, (site, size) in sites.items():
        needed = size * _mean(densities[layer, site])
        yield Weight(f"{prefix}{name}.weight", "attention", size, size, needed, is_matrix=True, layer=layer, site=site)
        if config.attention_bias == "all" or (config.attention_bias == "qkv" and name == "qkv"):
            # Added to the product, so no selection leaves it out.
            outputs = size // (width if name == "qkv" else mixed)
            yield Weight(f"{prefix}{name}.bias", "attention", outputs, outputs, outputs, is_matrix=False)
    if config.qk_norm != "none":
        together = config.qk_norm == "all_heads"
        yield _norm(f"{prefix}query_norm.weight", mixed if together else channels)
        yield _norm(f"{prefix}key_norm.weight", num_kv_heads(config) * channels if together else channels)


def _latent_attention(config: ModelConfig, densities: Densities, layer: int) -> Iterator[Weight]:
    prefix, width, sizes = f"layers.{layer}.attention.", config.hidden_size, latent_sizes(config)
    assert sizes is not None
    queries = config.num_heads * sizes.query_head_size
    keys_and_values = config.num_heads * (sizes.nope_head_size + sizes.value_head_size)
    down = (sizes.query_rank or queries) + sizes.cached_size
    found: dict[str, tuple[Site | None, int]] = {"down": ("attention_input", width * down)}
    if sizes.query_rank:
        found["query_up"] = (None, sizes.query_rank * queries)
        yield _norm(f"{prefix}query_latent_norm.weight", sizes.query_rank)
    found["latent_up"] = (None, sizes.key_value_rank * keys_and_values)
    yield _norm(f"{prefix}latent_norm.weight", sizes.key_value_rank)
    found["output"] = ("attention_output", mixed_size(config) * width)
    for name, (site, size) in found.items():
        needed = size * (_mean(densities[layer, site]) if site else 1.0)
        key, behind = f"{prefix}{name}.weight", layer if site else -1
        yield Weight(key, "attention", size, size, needed, is_matrix=True, layer=behind, site=site)


def _feed_forward(config: ModelConfig, densities: Densities, layer: int) -> Iterator[Weight]:
    if not has_experts(config, layer):
        yield from _gated(config, densities, layer, "dense", dense_hidden_size(config))
        return
    moe = config.moe
    yield _router(f"layers.{layer}.moe.router.weight", moe.num_experts * config.hidden_size)
    yield from _gated(config, densities, layer, "experts", moe.expert_hidden_size)
    if moe.num_shared_experts:
        yield from _gated(config, densities, layer, "shared", shared_hidden_size(config))
        if moe.shared_expert_gate:
            yield _router(f"layers.{layer}.moe.shared.token_gate", config.hidden_size)


_SITES_OF: dict[str, tuple[str, Site, Site]] = {
    "experts": ("moe.experts", "expert_input", "expert_hidden"),
    "shared": ("moe.shared", "shared_input", "shared_hidden"),
    "dense": ("dense", "dense_input", "dense_hidden"),
}


def _gated(config: ModelConfig, densities: Densities, layer: int, part: str, hidden: int) -> Iterator[Weight]:
    """Yield gate (if any), up and down: stored for every expert and active for A of them; once for other parts."""
    prefix, input_site, hidden_site = _SITES_OF[part]
    moe, size = config.moe, config.hidden_size * hidden
    stored, active = (moe.num_experts, densities.experts(config, layer)) if part == "experts" else (1, 1)
    gate = [("w_gate", input_site)] if has_gate(config) else []
    for name, site in (*gate, ("w_up", input_site), ("w_down", hidden_site)):
        inputs = densities[layer, site]
        by_rows = active * size * _mean(inputs)
        key = f"layers.{layer}.{prefix}.{name}"
        needed = by_rows
        if config.sparsity.selection == "shared" and site == input_site:
            # Columns of gate and up outside of the set that the tokens of an expert share are not needed either.
            needed = active * size * _mean_product(inputs, densities[layer, hidden_site])
        of_token = round(active * size)
        yield Weight(
            key, part, stored * size, of_token, needed, is_matrix=True, layer=layer, site=site, by_rows=by_rows
        )
