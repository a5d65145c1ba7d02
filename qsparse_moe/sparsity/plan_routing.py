"""The routing half of a sparsity plan: how many of a token's experts every MoE layer uses. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qsparse_moe.config.schema import ModelConfig, Site
from qsparse_moe.errors import ConfigError


def check_routing(
    places: Iterable[tuple[int, Site]], experts_per_token: Mapping[int, int], top_p: Mapping[int, float]
) -> None:
    """Raise ConfigError unless every entry is in its range and belongs to a layer with routed experts."""
    routed = {layer for layer, site in places if site == "expert_hidden"}
    for name, entries in (("experts_per_token", experts_per_token), ("top_p", top_p)):
        if absent := sorted(entries.keys() - routed):
            raise ConfigError(
                f"sparsity plan: {name} names the layers {absent}, which have no routed experts in this plan; name "
                f"layers of {sorted(routed)}"
            )
    for layer, number in experts_per_token.items():
        # bool is an int, and a plan file may hold any number.
        if type(number) is not int or number < 0:
            raise ConfigError(
                f"sparsity plan: layer {layer} has experts_per_token {number!r}; it must be a whole number of at least "
                "0, with which the layer uses no routed expert"
            )
    for layer, share in top_p.items():
        if not 0.0 < share <= 1.0:
            raise ConfigError(
                f"sparsity plan: layer {layer} has top_p {share!r}; it must lie in (0, 1], where 1 keeps every expert; "
                "for a layer without routed experts, set experts_per_token to 0"
            )


def check_at_most(experts_per_token: Mapping[int, int], config: ModelConfig) -> None:
    """Raise ConfigError if a layer has more experts per token than the model."""
    most = config.moe.experts_per_token
    for layer, number in experts_per_token.items():
        if number > most:
            raise ConfigError(
                f"sparsity plan: layer {layer} has experts_per_token {number}, which must be at most the "
                f"model.moe.experts_per_token ({most}) with which the model was built; lower it, or leave the layer out"
            )


def scaled_experts(
    experts_per_token: Mapping[int, int], scale: float, model_experts_per_token: int | None
) -> dict[int, int]:
    """Return the numbers at ``scale`` of the way from those of the model to these, rounded to the nearest.

    A layer that still has the number of the model is left out.
    """
    if not experts_per_token:
        return {}
    assert model_experts_per_token is not None, "a plan with experts per token is scaled from the A of the model"
    scaled = {
        layer: round(model_experts_per_token + scale * (number - model_experts_per_token))
        for layer, number in experts_per_token.items()
    }
    return {layer: number for layer, number in scaled.items() if number != model_experts_per_token}
