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
    "yarn": ("factor", "original_length", "beta_slow", "beta_fast", "attention_factor", "score_factor"),
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


_ORDER = {"llama3": ("low_frequency_factor", "high_frequency_factor"), "yarn": ("beta_slow", "beta_fast")}
"""Two numbers of turns by type, of which the first is the smaller one."""


def _order_of_factors(config: ModelConfig) -> Iterator[Problem]:
    scaling = config.rope_scaling
    if scaling.type not in _ORDER:
        return
    low, high = _ORDER[scaling.type]
    if getattr(scaling, low) >= getattr(scaling, high):
        yield Problem(
            f"{_PATH}.{low} ({getattr(scaling, low)}) must be below {_PATH}.{high} ({getattr(scaling, high)}); lower "
            "the one or raise the other",
            (f"{_PATH}.{low}", f"{_PATH}.{high}"),
        )


def _base_of_yarn(config: ModelConfig) -> Iterator[Problem]:
    """The channel with a given number of turns is found by the logarithm of the base."""
    if config.rope_scaling.type == "yarn" and config.rope_theta <= 1:
        yield Problem(
            f"model.rope_theta ({config.rope_theta}) must be above 1 when {_PATH}.type is yarn; raise it, or choose "
            "another type",
            ("model.rope_theta", f"{_PATH}.type"),
        )


def _scores_of_latent_attention(config: ModelConfig) -> Iterator[Problem]:
    factor = config.rope_scaling.score_factor
    if factor != 1 and config.rope_scaling.type == "yarn" and config.latent_attention.key_value_rank is None:
        yield Problem(
            f"{_PATH}.score_factor ({factor}) must be 1 without latent attention "
            f"(model.latent_attention.key_value_rank is null); use {_PATH}.attention_factor, whose square it is for "
            "channels that are all rotated",
            (f"{_PATH}.score_factor", "model.latent_attention.key_value_rank"),
        )


ROTARY_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    _unused_fields,
    _original_length,
    _order_of_factors,
    _base_of_yarn,
    _scores_of_latent_attention,
)
