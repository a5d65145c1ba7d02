"""The settings of a ``config.json`` of model type ``qsparse_moe``. Needs neither torch nor transformers.

The section ``qsparse_moe`` is the model section of a run, and ``sparsity_plan`` the plan in use. Beside them stand the
names that tools read. They follow from the section and must agree with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qsparse_moe.config.load import model_from_settings
from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import dense_hidden_size, head_size, latent_sizes, num_kv_heads, vocab_size
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan

MODEL_TYPE = "qsparse_moe"
ARCHITECTURE = "QSparseMoEForCausalLM"
SECTION, PLAN = "qsparse_moe", "sparsity_plan"
PREFIX = "model."
"""The name in front of the names of our state dict in files that transformers saves."""


def standard_settings(model: ModelConfig) -> dict[str, Any]:
    """Return the settings of a model that tools read, under the names of transformers."""
    latent = latent_sizes(model)
    # Through transformers' caches, latent attention has keys and values of every head, padded to one size.
    channels = max(latent.query_head_size, latent.value_head_size) if latent else head_size(model)
    return {
        "vocab_size": vocab_size(model),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads if latent else num_kv_heads(model),
        "head_dim": channels,
        "intermediate_size": dense_hidden_size(model),
        "moe_intermediate_size": model.moe.expert_hidden_size,
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.experts_per_token,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def section_settings(model: ModelConfig, plan: SparsityPlan) -> dict[str, Any]:
    """Return the section of a model and its plan, from which ``read_settings`` restores both, and the standard names.

    The plan is written only if it is not the one that the section describes.
    """
    # The path of a plan file means nothing on another machine.
    alone = _without_plan_file(model)
    is_described = plan == SparsityPlan.from_config(alone)
    return {
        SECTION: alone.model_dump(mode="json"),
        PLAN: None if is_described else json.loads(plan.to_json()),
        **standard_settings(model),
    }


def config_json(model: ModelConfig, plan: SparsityPlan, *, dtype: str, max_length: int) -> dict[str, Any]:
    """Return the content of a ``config.json``, as ``QSparseMoEConfig`` saves it.

    Args:
        model: the model section of a run.
        plan: the plan in use.
        dtype: dtype of the weights, such as ``float32``.
        max_length: number of tokens per sequence in training.
    """
    names = {"architectures": [ARCHITECTURE], "dtype": dtype, "max_position_embeddings": max_length}
    return {"model_type": MODEL_TYPE} | names | section_settings(model, plan)


def read_settings(settings: Mapping[str, Any], where: str) -> tuple[ModelConfig, SparsityPlan]:
    """Return the model and the plan of a ``config.json``; without a section, the default model.

    Args:
        settings: the content of the file; other settings than those of this module are not read.
        where: the name of the file, for messages.

    Raises:
        ConfigError: the section or the plan is invalid, or a standard name contradicts the section.
    """
    section = settings.get(SECTION)
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(
            f"{where}: {SECTION} ({show(section)}) must be an object with the settings of the model; export it again"
        )
    _check_no_plan_file(section or {}, where)
    try:
        model = model_from_settings(dict(section or {}), f"{where}: {SECTION}")
    except ConfigError as error:
        raise ConfigError(f"{where}: the section {SECTION}, which is the model section of a run: {error}") from error
    _check_standard_names(settings, model, where)
    return model, _read_plan(settings.get(PLAN), model, where)


def _check_no_plan_file(section: Mapping[str, Any], where: str) -> None:
    sparsity = section.get("sparsity")
    file = sparsity.get("plan") if isinstance(sparsity, Mapping) else None
    if file is not None:
        raise ConfigError(
            f"{where}: {SECTION}.sparsity.plan ({show(file)}) must be null here, because the file would not be "
            f"copied with the model; put its content under {PLAN}"
        )


def _read_plan(content: Any, model: ModelConfig, where: str) -> SparsityPlan:
    try:
        plan = SparsityPlan.from_config(model) if content is None else SparsityPlan.from_json(json.dumps(content))
        plan.check_fits(model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {PLAN}: {error}") from error
    return plan


def _check_standard_names(settings: Mapping[str, Any], model: ModelConfig, where: str) -> None:
    for name, value in standard_settings(model).items():
        found = settings.get(name)
        if found is not None and found != value:
            raise ConfigError(
                f"{where}: {name} ({show(found)}) must be {show(value)}, which follows from the section {SECTION}; "
                "change the section, and remove or correct this name"
            )


def _without_plan_file(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"sparsity": model.sparsity.model_copy(update={"plan": None})})
