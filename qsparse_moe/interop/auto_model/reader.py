"""Read a folder of model type ``qsparse_moe``, by whatever program it was saved; needs no transformers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qsparse_moe.config.schema import ModelConfig, ScheduleConfig, SitesConfig
from qsparse_moe.config.shapes import model_sites, site_format
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.interop.auto_model.settings import PREFIX, read_settings
from qsparse_moe.interop.empty_model import empty_model
from qsparse_moe.interop.families.recipe import Recipes, buffer, copied
from qsparse_moe.interop.families.settings import FamilySettings
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.checkpoint.state import global_shapes, state_buffers


def read_own(settings: FamilySettings) -> tuple[ModelConfig, SparsityPlan]:
    """Return the model and the plan of a ``config.json``.

    Raises:
        CheckpointError: the section or the plan is invalid, or a standard name contradicts the section.
    """
    try:
        return read_settings(settings.values, str(settings.file))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def own_recipes(model: ModelConfig, stored: Collection[str]) -> Recipes:
    """Return the recipe of every tensor, stored under our names, with or without the one in front of them."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
    empty = empty_model(model)
    recipes = {name: copied(prefix + name, *shape) for name, shape in global_shapes(empty).items()}
    return recipes | {name: buffer(prefix + name, *value.shape) for name, value in state_buffers(empty).items()}


def started(model: ModelConfig, plan: SparsityPlan, file: str) -> ModelConfig:
    """Return the model section of an export of the model with ``plan``, which is already in use.

    Where the section does not describe the plan, it names the plan's ``file``, and keeps the number formats.
    """
    sparsity = model.sparsity.model_copy(update={"schedule": ScheduleConfig()})
    if plan != SparsityPlan.from_config(model):
        # A preset gives number formats too.
        formats: dict[str, Any] = {site: site_format(sparsity, site) for site in model_sites(model)}
        sites = sparsity.quantization.sites.model_copy(update=formats)
        quantization = sparsity.quantization.model_copy(update={"sites": sites})
        nothing = {"preset": None, "default": None, "sites": SitesConfig(), "overrides": ()}
        sparsity = sparsity.model_copy(update={"plan": file, "quantization": quantization} | nothing)
    return model.model_copy(update={"sparsity": sparsity})
