"""Find the family that can express one of our models: its ``config.json`` must describe the same function when read.

A setting that a family lacks needs no rule here, because it differs once the file has been written and read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import (
    dense_hidden_size,
    head_size,
    model_sites,
    moe_layers,
    num_kv_heads,
    shared_hidden_size,
    site_format,
    vocab_size,
)
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.families.registry import FAMILIES, Family, model_config
from qsparse_moe.interop.families.settings import CONFIG_JSON, FamilySettings
from qsparse_moe.runs.folder import settings_by_path
from qsparse_moe.sparsity.plan import SparsityPlan

# They have no effect on a trained model, or only choose among implementations of one function.
_TRAINING_ONLY = frozenset(
    {
        "attention_backend",
        "init_std",
        "moe.backend",
        "moe.bias_update_steps",
        "moe.capacity_factor",
        "moe.load_balance_coefficient",
        "moe.load_balance_scope",
        "moe.router_jitter",
        "moe.router_noise",
        "moe.router_z_coefficient",
    }
)
_SPARSITY = "sparsity."
_UNREADABLE = f"a {CONFIG_JSON} for this model"


def with_plan_as_setting(config: ModelConfig, plan: SparsityPlan) -> tuple[ModelConfig, SparsityPlan]:
    """Return the same function with its experts per token as the A of the model, if all layers use the same number.

    Otherwise both are returned as they are.
    """
    used = {plan.experts(layer, config.moe.experts_per_token) for layer in moe_layers(config)}
    # A family's router chooses at least one expert, always as many, and computes the weights of that many.
    if len(used) != 1 or not min(used) or any(share < 1.0 for share in plan.top_p.values()) or not _as_router(config):
        return config, plan
    # What follows from A by default is fixed first.
    changed = {"experts_per_token": used.pop(), "dense_hidden_size": dense_hidden_size(config)}
    moe = config.moe.model_copy(update=changed)
    return config.model_copy(update={"moe": moe}), replace(plan, experts_per_token={}, top_p={})


def _as_router(config: ModelConfig) -> bool:
    """Return whether the weights of fewer experts are those of a router that chooses as many."""
    mode, router = config.moe.fewer_experts_weights, config.moe.router
    # Weights that are divided by their sum have the sum of all; weights of single scores stay as they are.
    normalizes = router == "topk_softmax" or router.endswith("renormalized")
    return mode in ("router", "renormalized" if normalizes else "kept")


def family_settings(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a ``config.json`` of a family, apart from those that do not describe the function."""
    family = FAMILIES[model_type]
    return {"architectures": [family.architecture], "model_type": model_type} | family.config_json(config)


def find_expressing(config: ModelConfig, plan: SparsityPlan, *, first: str | None = None) -> str | None:
    """Return the ``model_type`` of a family that can express the model with S as in ``plan``; None if there is none.

    ``first`` is preferred: Llama and Mistral, for example, are the same function.
    """
    config, plan = with_plan_as_setting(config, plan)
    names = sorted(FAMILIES, key=lambda name: name != first)
    return next((name for name in names if not obstacles(name, config, plan)), None)


def nearest_family(config: ModelConfig, plan: SparsityPlan) -> tuple[str, list[str]]:
    """Return the family with the fewest obstacles, and these."""
    config, plan = with_plan_as_setting(config, plan)
    found = {name: obstacles(name, config, plan) for name in FAMILIES}
    # A file that cannot be read back says nothing about the other settings.
    name = min(
        found, key=lambda name: (any(reason.startswith(_UNREADABLE) for reason in found[name]), len(found[name]))
    )
    return name, found[name]


def obstacles(model_type: str, config: ModelConfig, plan: SparsityPlan) -> list[str]:
    """Return every setting with its value that a family cannot express, with what it has instead."""
    return _sparse_settings(config, plan) + _differences(model_type, FAMILIES[model_type], config)


def _sparse_settings(config: ModelConfig, plan: SparsityPlan) -> list[str]:
    sites = model_sites(config)
    largest = {site: max(max(plan.values[place]) for place in plan.values if place[1] == site) for site in sites}
    found = [f"S at {site} ({show(value)}), which must be 0" for site, value in largest.items() if value > 0]
    formats = {site: site_format(config.sparsity, site) for site in sites}
    found += [
        f"the number format at {site} (model.sparsity.quantization: {name}), which must be none"
        for site, name in formats.items()
        if name != "none"
    ]
    found += [
        f"{name} of the sparsity plan, by layer ({show(dict(entries))}), which must be one number of at least 1 and no "
        "share"
        for name, entries in (("experts_per_token", plan.experts_per_token), ("top_p", plan.top_p))
        if entries
    ]
    weights = config.sparsity.quantization.weights
    if weights != "none":
        found.append(f"model.sparsity.quantization.weights ({weights}), which must be none")
    return found


def _differences(model_type: str, family: Family, config: ModelConfig) -> list[str]:
    try:
        there = model_config(family, FamilySettings(Path(CONFIG_JSON), family_settings(model_type, config)))
    except CheckpointError as error:
        return [f"{_UNREADABLE} ({error})"]
    ours, theirs = _function(config), _function(there)
    return [
        f"model.{path} ({show(ours.get(path))}), which is {show(theirs.get(path))} in {model_type}"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]


def _function(config: ModelConfig) -> Mapping[str, Any]:
    """Return the settings on which the dense model's function depends, each in one form."""
    settings = settings_by_path(config.model_dump(mode="json"))
    settings = {
        path: value for path, value in settings.items() if path not in _TRAINING_ONLY and not path.startswith(_SPARSITY)
    }
    moe, routed = config.moe, moe_layers(config)
    settings |= {
        "vocab_size": vocab_size(config),
        "num_kv_heads": num_kv_heads(config),
        "head_size": head_size(config),
        "moe.shared_expert_hidden_size": shared_hidden_size(config),
        "moe.shared_expert_gate": moe.num_shared_experts > 0 and moe.shared_expert_gate,
        "moe.dense_hidden_size": dense_hidden_size(config) if len(routed) < config.num_layers else None,
        "moe.num_dense_layers and moe.moe_layer_interval": list(routed),
        # The same function, in another order of its steps.
        "moe.router": "softmax_topk_renormalized" if moe.router == "topk_softmax" else moe.router,
        # Without a selection in front of the experts, both are the same.
        "moe.router_input": "dense",
        # The rate matters to training only, but a model with one has biases.
        "moe.bias_update_rate": moe.bias_update_rate if moe.bias_update_rate == 0 else "above 0",
    }
    # The last has an effect on plans with fewer experts per token alone.
    for path in ("num_shared_experts", "num_dense_layers", "moe_layer_interval", "fewer_experts_weights"):
        del settings[f"moe.{path}"]
    if not routed:
        kept = ("moe.activation", "moe.dense_hidden_size", "moe.num_dense_layers and moe.moe_layer_interval")
        settings = {path: value for path, value in settings.items() if path in kept or not path.startswith("moe.")}
    elif moe.num_expert_groups == 1:
        settings |= {"moe.groups_per_token": 1, "moe.group_score": None}
    if config.rope_scaling.type == "none":
        settings = {path: value for path, value in settings.items() if not path.startswith("rope_scaling.")}
    return settings
