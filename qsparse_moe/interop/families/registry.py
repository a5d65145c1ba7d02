"""The families by the ``model_type`` of their ``config.json``. A new family is a module here with three functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.config.rules import check_model
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.interop.families import deepseek, dense, mixtral, olmoe, qwen2_moe, qwen3_moe
from qsparse_moe.interop.families.recipe import Recipes
from qsparse_moe.interop.families.settings import FamilySettings


@dataclass(frozen=True)
class Family:
    """The functions that read and write the files of one architecture."""

    settings: Callable[[FamilySettings], dict[str, Any]]
    """Returns the settings of ``ModelConfig``, or raises CheckpointError for a setting that is not supported."""
    recipes: Callable[[ModelConfig, Collection[str]], Recipes]
    """Returns the recipe of every tensor of the model, from the names of the stored tensors."""
    config_json: Callable[[ModelConfig], dict[str, Any]]
    """Returns the settings of the ``config.json`` that is nearest to a model; ``expressible`` compares the two."""
    architecture: str
    """The class of transformers, as ``config.json`` names it."""
    left_out: Callable[[ModelConfig, Collection[str]], Mapping[str, str]] = lambda config, stored: {}
    """Returns the stored tensors that the model does not need, each with its purpose, which is logged."""


FAMILIES = {
    "deepseek_v2": Family(deepseek.v2_settings, deepseek.recipes, deepseek.v2_json, "DeepseekV2ForCausalLM"),
    "deepseek_v3": Family(
        deepseek.v3_settings, deepseek.recipes, deepseek.v3_json, "DeepseekV3ForCausalLM", deepseek.left_out
    ),
    "llama": Family(dense.llama_settings, dense.recipes, dense.llama_json, "LlamaForCausalLM"),
    "mistral": Family(dense.mistral_settings, dense.recipes, dense.mistral_json, "MistralForCausalLM"),
    "mixtral": Family(mixtral.settings, mixtral.recipes, mixtral.config_json, "MixtralForCausalLM"),
    "olmoe": Family(olmoe.settings, olmoe.recipes, olmoe.config_json, "OlmoeForCausalLM"),
    "qwen2": Family(dense.qwen2_settings, dense.recipes, dense.qwen2_json, "Qwen2ForCausalLM"),
    "qwen2_moe": Family(qwen2_moe.settings, qwen2_moe.recipes, qwen2_moe.config_json, "Qwen2MoeForCausalLM"),
    "qwen3": Family(dense.qwen3_settings, dense.recipes, dense.qwen3_json, "Qwen3ForCausalLM"),
    "qwen3_moe": Family(qwen3_moe.settings, qwen3_moe.recipes, qwen3_moe.config_json, "Qwen3MoeForCausalLM"),
}


NOT_EXPRESSIBLE = {
    "gpt_oss": "attention sinks, biases in attention, router, and experts, and a clamped activation function in the "
    "experts, which this package's model does not have",
}
"""Known families that cannot be read, with what they would need."""


def find_family(settings: FamilySettings) -> Family:
    """Return the family of a ``config.json``.

    Raises:
        CheckpointError: it is not supported.
    """
    family = FAMILIES.get(settings.model_type)
    if settings.model_type in NOT_EXPRESSIBLE:
        raise CheckpointError(
            f"{settings.file}: model_type ({show(settings.model_type)}) has {NOT_EXPRESSIBLE[settings.model_type]}; "
            f"name a model of one of these: {', '.join(FAMILIES)}"
        )
    if family is None:
        raise CheckpointError(
            f"{settings.file}: model_type ({show(settings.model_type)}) is not a family that can be read; name a model "
            f"of one of these: {', '.join(FAMILIES)}"
        )
    return family


_QUANTIZED = (
    "quantized weights (fp8, 4 bits) are not read; name weights in bf16 or fp32, or convert them with their tools"
)


def model_config(family: Family, settings: FamilySettings) -> ModelConfig:
    """Return the dense model, with S = 0, that a ``config.json`` describes.

    Raises:
        CheckpointError: a setting is invalid, unknown, or not supported.
    """
    settings.require("quantization_config", None, reason=_QUANTIZED)
    values = family.settings(settings)
    settings.check_all_read()
    try:
        config = ModelConfig.model_validate(values)
        check_model(config)
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{settings.file}: describes a model that this package cannot build ({error}); name another model"
        ) from error
    return config
