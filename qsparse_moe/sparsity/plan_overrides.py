"""The (layer, site) places of a model, and the settings of a plan for some of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qsparse_moe.config.schema import ModelConfig, RoutingOverride, Site, SparsityOverride
from qsparse_moe.config.selectors import select
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, moe_layers


def model_places(config: ModelConfig) -> Iterator[tuple[tuple[int, Site], int]]:
    """Yield every (layer, site) of the model and its number of values of S: one, or one per expert."""
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            yield (layer, site), config.moe.num_experts if site in EXPERT_SITES else 1


def apply_override(
    values: dict[tuple[int, Site], tuple[float, ...]], override: SparsityOverride, config: ModelConfig
) -> bool:
    """Apply ``override`` to ``values`` and return whether it matched any site; ValueError if out of range."""
    layers = _select_named("layers", override.layers, config.num_layers)
    experts = _select_named("experts", override.experts, config.moe.num_experts)
    matched = False
    for place in values:
        layer, site = place
        # An override that names experts leaves out sites without experts, whose one S belongs to no expert.
        per_expert = site in EXPERT_SITES
        if (
            layer not in layers
            or override.site not in (None, site)
            or (override.experts is not None and not per_expert)
        ):
            continue
        chosen = experts if per_expert else (0,)
        values[place] = tuple(override.sparsity if i in chosen else v for i, v in enumerate(values[place]))
        matched = True
    return matched


def routing_settings(config: ModelConfig) -> tuple[dict[int, int], dict[int, float]]:
    """Return the experts per token and ``top_p`` by layer that the settings give to MoE layers."""
    settings = config.sparsity
    experts_per_token: dict[int, int] = {}
    top_p: dict[int, float] = {}
    whole = RoutingOverride(experts_per_token=settings.experts_per_token, top_p=settings.top_p)
    for override in (whole, *settings.routing_overrides):
        layers = set(select(override.layers, config.num_layers)) & set(moe_layers(config))
        if override.experts_per_token is not None:
            experts_per_token |= dict.fromkeys(sorted(layers), override.experts_per_token)
        if override.top_p is not None:
            top_p |= dict.fromkeys(sorted(layers), override.top_p)
    return experts_per_token, top_p


def _select_named(name: str, selector: int | str | Sequence[int] | None, count: int) -> tuple[int, ...]:
    try:
        return select(selector, count)
    except ValueError as error:
        raise ValueError(f"{name} ({selector!r}) {error}") from None
