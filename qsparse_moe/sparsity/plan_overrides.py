"""The (layer, site) places of a model, and settings that change S at some of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qsparse_moe.config.schema import ModelConfig, Site, SparsityOverride
from qsparse_moe.config.selectors import select
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites


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


def _select_named(name: str, selector: int | str | Sequence[int] | None, count: int) -> tuple[int, ...]:
    try:
        return select(selector, count)
    except ValueError as error:
        raise ValueError(f"{name} ({selector!r}) {error}") from None
