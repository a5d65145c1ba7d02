"""Rules inside ``model.moe``: the number of experts, the layers that have them, and the shared experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qsparse_moe.config.problems import Problem, show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import moe_layers


def _experts(config: ModelConfig) -> Iterator[Problem]:
    moe = config.moe
    if moe.experts_per_token > moe.num_experts:
        yield Problem(
            f"model.moe.experts_per_token ({moe.experts_per_token}) must be at most model.moe.num_experts "
            f"({moe.num_experts}); lower the one or raise the other",
            ("model.moe.experts_per_token", "model.moe.num_experts"),
        )
    if moe.num_dense_layers > config.num_layers:
        yield Problem(
            f"model.moe.num_dense_layers ({moe.num_dense_layers}) must be at most model.num_layers "
            f"({config.num_layers}); {config.num_layers} makes every layer dense",
            ("model.moe.num_dense_layers", "model.num_layers"),
        )


def _shared_experts(config: ModelConfig) -> Iterator[Problem]:
    """Settings of the shared experts have no meaning without shared experts."""
    if config.moe.num_shared_experts:
        return
    for name in ("shared_expert_hidden_size", "shared_expert_gate"):
        value = getattr(config.moe, name)
        # Both are off when they are null or false, and then a file may still contain them.
        if value:
            yield Problem(
                f"model.moe.{name} ({show(value)}) has no meaning when model.moe.num_shared_experts is 0; remove it, "
                "or set num_shared_experts",
                (f"model.moe.{name}", "model.moe.num_shared_experts"),
            )


def _layer_interval(config: ModelConfig) -> Iterator[Problem]:
    """Only num_dense_layers may make every layer dense; an interval that skips all of them is a mistake."""
    interval, num_dense, num_layers = config.moe.moe_layer_interval, config.moe.num_dense_layers, config.num_layers
    if num_dense < num_layers and not moe_layers(config):
        yield Problem(
            f"model.moe.moe_layer_interval ({interval}) must leave at least one layer with experts, but none of "
            f"the model.num_layers ({num_layers}) after the first model.moe.num_dense_layers ({num_dense}) is a "
            f"multiple of it, counted from 1; use {num_layers} for experts in the last layer, or "
            f"num_dense_layers={num_layers} for none",
            ("model.moe.moe_layer_interval", "model.moe.num_dense_layers", "model.num_layers"),
        )


MOE_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (_experts, _shared_experts, _layer_interval)
