"""Rules of multi-head latent attention: its sizes belong together and replace those of ordinary attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qsparse_moe.config.problems import Problem, show
from qsparse_moe.config.schema import LatentAttentionConfig, ModelConfig

_PATH = "model.latent_attention"
_RANK = f"{_PATH}.key_value_rank"
_HEAD_SIZES = ("nope_head_size", "rope_head_size", "value_head_size")


def _all_or_none(config: ModelConfig) -> Iterator[Problem]:
    latent = config.latent_attention
    if latent.key_value_rank is None:
        for name in LatentAttentionConfig.model_fields:
            value = getattr(latent, name)
            if value is not None:
                yield Problem(
                    f"{_PATH}.{name} ({value}) has no meaning when {_RANK} is null, which is ordinary attention; "
                    "remove it, or set the rank",
                    (f"{_PATH}.{name}", _RANK),
                )
        return
    for name in _HEAD_SIZES:
        if getattr(latent, name) is None:
            yield Problem(
                f"{_PATH}.{name} (null) must be set when {_RANK} ({latent.key_value_rank}) is: latent attention takes "
                "no size from model.hidden_size; DeepSeek-V3 has nope_head_size 128, rope_head_size 64, and "
                "value_head_size 128",
                (f"{_PATH}.{name}", _RANK),
            )


def _even_rotation(config: ModelConfig) -> Iterator[Problem]:
    size = config.latent_attention.rope_head_size
    if size is not None and size % 2:
        yield Problem(
            f"{_PATH}.rope_head_size ({size}) must be even, because the rotary embedding rotates pairs of channels; "
            f"{size + 1} is even",
            (f"{_PATH}.rope_head_size",),
        )


_REPLACED = {
    "num_kv_heads": "every head has keys and values of its own, computed from one vector per token",
    "head_size": "its head sizes are nope_head_size + rope_head_size for queries and keys, and value_head_size",
    "qk_norm": "it has norms of its own, of the vectors from which queries, keys, and values are computed",
    "attention_bias": "it has no biases",
}
"""Settings of ordinary attention, and the reason why they have no meaning beside latent attention."""


def _ordinary_settings(config: ModelConfig) -> Iterator[Problem]:
    rank = config.latent_attention.key_value_rank
    if rank is None:
        return
    for name, reason in _REPLACED.items():
        value = getattr(config, name)
        # Where they are off, a file may still contain them.
        if value not in (None, "none"):
            yield Problem(
                f"model.{name} ({show(value)}) has no meaning with latent attention ({_RANK} is {rank}): {reason}; "
                f"remove it, or set {_RANK} to null",
                (f"model.{name}", _RANK),
            )


LATENT_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    _all_or_none,
    _even_rotation,
    _ordinary_settings,
)
