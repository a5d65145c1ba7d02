"""The plan that ``drop_in.sparsify`` has kept in the ``config.json`` of a model of transformers."""

from __future__ import annotations

from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, site_width
from qsparse_moe.errors import CheckpointError, ConfigError
from qsparse_moe.interop.drop_in.hosts import LayerSite, Place
from qsparse_moe.interop.drop_in.plans import CONFIG_KEY, check_fits, from_config
from qsparse_moe.interop.families.settings import FamilySettings
from qsparse_moe.sparsity.plan import SparsityPlan


def kept_plan(settings: FamilySettings) -> Any:
    """Return the entry of ``config.json`` with the plan; None if the model was saved while it was dense."""
    return settings.optional(CONFIG_KEY)


def with_kept_plan(model: ModelConfig, entry: Any, settings: FamilySettings) -> tuple[ModelConfig, SparsityPlan]:
    """Return the model with the settings of the selection, and the plan.

    Raises:
        CheckpointError: the entry is damaged, or is for another model.
    """
    places = _places(model)
    try:
        plan, sparsity = from_config(entry, places)
        check_fits(plan, places, sparsity)
    except ConfigError as error:
        raise CheckpointError(f"{settings.file}: {str(error).removeprefix('config.json: ')}") from error
    return model.model_copy(update={"sparsity": sparsity}), plan


def _places(model: ModelConfig) -> dict[LayerSite, Place]:
    return {
        (layer, site): Place(site_width(model, site), model.moe.num_experts if site in EXPERT_SITES else 1)
        for layer in range(model.num_layers)
        for site in layer_sites(model, layer)
    }
