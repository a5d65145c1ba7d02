"""Rules of the settings for fewer experts per token than the router chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qsparse_moe.config.problems import Problem, show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.selectors import select
from qsparse_moe.config.shapes import moe_layers

_PATH = "model.sparsity"
_MOST = "model.moe.experts_per_token"
_EXISTENCE = ("model.moe.num_dense_layers", "model.moe.moe_layer_interval", "model.num_layers")


def _at_most(config: ModelConfig) -> Iterator[Problem]:
    settings, most = config.sparsity, config.moe.experts_per_token
    given = [(f"{_PATH}.experts_per_token", settings.experts_per_token)]
    given += [
        (f"{_PATH}.routing_overrides.{index}.experts_per_token", override.experts_per_token)
        for index, override in enumerate(settings.routing_overrides)
    ]
    for path, number in given:
        if number is not None and number > most:
            yield Problem(
                f"{path} ({number}) must be at most {_MOST} ({most}), the number that the router chooses; lower the "
                "one or raise the other",
                (path, _MOST),
            )


def _no_experts(config: ModelConfig) -> Iterator[Problem]:
    if moe_layers(config):
        return
    for path, value in given_routing(config):
        yield Problem(
            f"{path} ({show(value)}) has no meaning when every layer is dense (model.moe.num_dense_layers is "
            f"{config.moe.num_dense_layers}); remove it, or let layers have experts",
            (path, *_EXISTENCE),
        )


def _overrides(config: ModelConfig) -> Iterator[Problem]:
    routed = moe_layers(config)
    for index, override in enumerate(config.sparsity.routing_overrides):
        path = f"{_PATH}.routing_overrides.{index}"
        if override.experts_per_token is None and override.top_p is None:
            yield Problem(f"{path} changes nothing; give it experts_per_token or top_p, or remove it", (path,))
        try:
            layers = select(override.layers, config.num_layers)
        except ValueError as error:
            yield Problem(f"{path}.layers ({show(override.layers)}) {error}", (path, "model.num_layers"))
            continue
        # With no MoE layer at all, the rule above reports it.
        if routed and not set(layers) & set(routed):
            yield Problem(
                f"{path}.layers ({show(override.layers)}) selects no layer with experts; those are {show(routed)}",
                (path, *_EXISTENCE),
            )


def given_routing(config: ModelConfig) -> Iterator[tuple[str, object]]:
    """Yield the path and the value of every setting for fewer experts per token that is not its default."""
    settings = config.sparsity
    for name in ("experts_per_token", "top_p"):
        if getattr(settings, name) is not None:
            yield f"{_PATH}.{name}", getattr(settings, name)
    for index, override in enumerate(settings.routing_overrides):
        yield f"{_PATH}.routing_overrides.{index}", override.model_dump(exclude_none=True, mode="json")


def _plan_file(config: ModelConfig) -> Iterator[Problem]:
    plan, path = config.sparsity.plan, f"{_PATH}.plan"
    if plan is None:
        return
    for other, value in given_routing(config):
        yield Problem(
            f"{other} ({show(value)}) must be unset if {path} ({plan}) is set, because the plan gives the experts per "
            "token of every layer; remove one of them",
            (path, other),
        )


FEWER_EXPERTS_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    _at_most,
    _no_experts,
    _overrides,
    _plan_file,
)
"""Every rule of these settings."""
