"""Rules about scaled rotary frequencies."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qsparse_moe.config.problems import Problem, show
from qsparse_moe.config.rotary_schema import RopeScalingConfig
from qsparse_moe.config.schema import ModelConfig

_PATH = "model.rope_scaling"
FIELDS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
}
"""The settings that every type uses."""


def _unused_fields(config: ModelConfig) -> Iterator[Problem]:
    scaling, defaults = config.rope_scaling, RopeScalingConfig()
    for name, value in scaling:
        if name != "type" and name not in FIELDS[scaling.type] and value != getattr(defaults, name):
            types = " or ".join(kind for kind, fields in FIELDS.items() if name in fields)
            yield Problem(
                f"{_PATH}.{name} ({show(value)}) has no meaning when {_PATH}.type is {scaling.type}; remove it, or "
                f"choose {types}",
                (f"{_PATH}.{name}", f"{_PATH}.type"),
            )


def _original_length(config: ModelConfig) -> Iterator[Problem]:
    scaling = config.rope_scaling
    if scaling.original_length is None and "original_length" in FIELDS[scaling.type]:
        yield Problem(
            f"{_PATH}.original_length (null) must be the length of the first training when {_PATH}.type is "
            f"{scaling.type}; set it",
            (f"{_PATH}.original_length", f"{_PATH}.type"),
        )


def _order_of_factors(config: ModelConfig) -> Iterator[Problem]:
    scaling = config.rope_scaling
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    if scaling.type == "llama3" and low >= high:
        yield Problem(
            f"{_PATH}.low_frequency_factor ({low}) must be below {_PATH}.high_frequency_factor ({high}); lower the one "
            "or raise the other",
            (f"{_PATH}.low_frequency_factor", f"{_PATH}.high_frequency_factor"),
        )


ROTARY_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    _unused_fields,
    _original_length,
    _order_of_factors,
)
