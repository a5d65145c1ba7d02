"""The plan of a model of transformers: from what a caller gives, checked, and kept in the model's configuration."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import Site, SparsityConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.interop.drop_in.hosts import LayerSite, Place
from qsparse_moe.sparsity.plan import SparsityPlan

Requested = SparsityPlan | float | Mapping[str, float] | Path | str
"""S for the sites of a model: a plan, the name of a plan file, one S for all sites, or one S per site by its name."""
CONFIG_KEY = "qsparse_moe"
"""The entry of ``config.json`` in which the plan and the settings of the selection are kept."""
_SETTINGS = ("selection", "group_size", "rescale", "gradient")


def requested_plan(
    requested: Requested, places: Mapping[LayerSite, Place], sites: Collection[str] | None = None
) -> SparsityPlan:
    """Return the plan that a caller asks for, with S = 0 at all sites that ``sites`` does not name.

    Raises:
        ConfigError: a site does not exist in the model, S is out of range, or a file cannot be read.
    """
    _check_names(sites or (), places)
    if isinstance(requested, Path | str):
        requested = SparsityPlan.load(requested)
    if isinstance(requested, SparsityPlan):
        plan = requested
    elif isinstance(requested, Mapping):
        _check_names(requested, places)
        plan = _plan({place: requested.get(place[1], 0.0) for place in places}, places)
    else:
        plan = _plan(dict.fromkeys(places, requested), places)
    if sites is None:
        return plan
    left_out = [place for place in plan.values if place[1] not in sites]
    values = dict(plan.values) | {place: (0.0,) * len(plan.values[place]) for place in left_out}
    thresholds = {place: own for place, own in plan.thresholds.items() if place[1] in sites}
    return replace(plan, values=values, thresholds=thresholds)


def check_requested(
    requested: Requested, plan: SparsityPlan, places: Mapping[LayerSite, Place], settings: SparsityConfig
) -> None:
    """Raise ConfigError as ``check_fits`` does for the plan that was ``requested``; if that is a file, it is named."""
    try:
        check_fits(plan, places, settings)
    except ConfigError as error:
        raise (ConfigError(f"{requested}: {error}") if isinstance(requested, Path | str) else error) from None


def check_fits(plan: SparsityPlan, places: Mapping[LayerSite, Place], settings: SparsityConfig) -> None:
    """Raise ConfigError unless ``plan`` has the sites of the model, and what the selection needs at each."""
    if settings.selection == "shared":
        raise ConfigError(
            "sparsify: selection (shared) needs running averages, which only training with this package measures; "
            "choose topk, block, threshold, statistical or relu, or import the model with qsparse-moe import"
        )
    if routed := sorted(plan.experts_per_token.keys() | plan.top_p.keys()):
        raise ConfigError(
            f"sparsity plan: it sets the experts per token of the layers {routed}, and the routers of a model of "
            "transformers stay as they are; leave experts_per_token and top_p out of the plan, or import the model "
            "with qsparse-moe import"
        )
    for place in sorted(places.keys() | plan.values.keys()):
        have, want = len(plan.values.get(place, ())), places[place].num_experts if place in places else 0
        if have != want:
            raise ConfigError(
                f"sparsity plan: layer {place[0]}, {place[1]} has {have} values, but the model needs {want}; make the "
                "plan from this model, with one S, with one per site, or with calibrate"
            )
        if any(plan.values[place]):
            _check_selection(plan, place, places[place], settings)


def to_config(plan: SparsityPlan, settings: SparsityConfig) -> dict[str, Any]:
    """Return the entry of ``config.json`` for a plan and its settings."""
    content = json.loads(plan.to_json())
    for entry in content["values"]:
        # One number instead of one per expert where all are equal: config.json has a line per number.
        for key in ("sparsity", "threshold"):
            if key in entry and len(set(entry[key])) == 1:
                entry[key] = entry[key][:1]
    return {name: getattr(settings, name) for name in _SETTINGS} | {"plan": content}


def from_config(entry: Mapping[str, Any], places: Mapping[LayerSite, Place]) -> tuple[SparsityPlan, SparsityConfig]:
    """Return the plan and the settings that ``to_config`` wrote.

    Raises:
        ConfigError: the entry is damaged, or was written by another version.
    """
    try:
        settings = SparsityConfig.model_validate({name: entry[name] for name in _SETTINGS})
        content = {**entry["plan"], "values": [_expanded(value, places) for value in entry["plan"]["values"]]}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.json: {CONFIG_KEY} is not readable ({error!r}); it must be what sparsify wrote. Remove it, and "
            "give sparsify a plan"
        ) from None
    return SparsityPlan.from_json(json.dumps(content)), settings


def invalid_setting(where: str, error: ValidationError) -> ConfigError:
    """Return the error of the first setting that a section of our configuration refused."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    return ConfigError(f"{where}: {name} ({show(first['input'])}) is not valid: {first['msg']}; correct it")


def _expanded(value: Mapping[str, Any], places: Mapping[LayerSite, Place]) -> dict[str, Any]:
    place = places.get((value["layer"], value["site"]))
    count = place.num_experts if place else 1
    lists = {key: value[key] for key in ("sparsity", "threshold") if key in value}
    return {**value, **{key: own * count if len(own) == 1 else own for key, own in lists.items()}}


def _plan(sparsity: Mapping[LayerSite, float], places: Mapping[LayerSite, Place]) -> SparsityPlan:
    return SparsityPlan({place: (float(sparsity[place]),) * size.num_experts for place, size in places.items()})


def _check_names(names: Collection[str], places: Mapping[LayerSite, Place]) -> None:
    existing: list[Site] = list(dict.fromkeys(site for _, site in places))
    for name in names:
        if name not in existing:
            raise ConfigError(f"sparsify: {show(name)} is not a site of this model; choose from {', '.join(existing)}")


def _check_selection(plan: SparsityPlan, place: LayerSite, size: Place, settings: SparsityConfig) -> None:
    where = f"sparsity plan: layer {place[0]}, {place[1]} has S above 0"
    if settings.selection == "block" and size.num_features % settings.group_size:
        raise ConfigError(
            f"{where} and {size.num_features} features, which group_size ({settings.group_size}) must divide; set S to "
            "0 there or use other groups"
        )
    if settings.selection == "threshold" and place not in plan.thresholds:
        raise ConfigError(
            f"{where} and no threshold, which selection (threshold) needs; make the plan with "
            "qsparse_moe.interop.drop_in.calibration.calibrate"
        )
