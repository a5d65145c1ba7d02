"""Put Q-Sparse into a model of transformers, change its S, and take it out again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import ValidationError
from torch import nn

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.interop.drop_in import hooks
from qsparse_moe.interop.drop_in.hosts import Host, LayerSite, Place, find_decoder, find_hosts, places_of
from qsparse_moe.interop.drop_in.plans import (
    CONFIG_KEY,
    Requested,
    check_requested,
    from_config,
    invalid_setting,
    requested_plan,
    to_config,
)
from qsparse_moe.interop.drop_in.runtime import select_rows
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import SparsityPlan

_PLAN = "qsparse_plan"
"""The attribute of the decoder that holds the present plan."""


def sparsify(
    model: nn.Module,
    plan: Requested | None = None,
    *,
    sites: Collection[str] | None = None,
    selection: Literal["topk", "block", "threshold", "statistical", "relu"] = "topk",
    group_size: int = 32,
    rescale: Literal["none", "unit", "preserve"] = "none",
    gradient: Literal["ste", "masked"] = "ste",
) -> SparsityPlan:
    """Put Q-Sparse into ``model``, in place: before the matrices of its attention, experts, and feed-forward networks.

    The weights and their names stay the same, so any trainer can train the model. Experts run through a function of
    this package, whatever implementation of transformers the model names. The plan and the settings are kept in
    ``model.config``; ``save_pretrained`` writes them into ``config.json``, and ``sparsify`` without a plan puts them
    back after ``from_pretrained``.

    Args:
        model: a model of transformers of one of the families in ``drop_in.hosts.FAMILIES``, also wrapped by peft.
        plan: S as one number for all sites, as one number per site by its name, as a ``SparsityPlan``, or as the name
            of a plan file; None: the plan and the settings in ``model.config``.
        sites: names of the sites; all others get S = 0. None: all sites of the plan.
        selection: as in ``model.sparsity.selection``.
        group_size: G, the number of features per group if ``selection`` is ``block``.
        rescale: as in ``model.sparsity.rescale``.
        gradient: ``ste``, the straight-through estimator of the paper, or ``masked``.

    Returns:
        The plan.

    Raises:
        ConfigError: the model is not supported, is sparse already, or the plan or a setting does not fit it.
        BackendUnavailable: transformers is not installed, or its version has no experts interface.
    """
    hosts = find_hosts(model)
    if sites_of(model):
        raise ConfigError(
            f"sparsify: {type(model).__name__} is sparse already; change its S with set_sparsity, or call densify first"
        )
    places = places_of(hosts)
    if plan is None:
        plan, settings = _kept(model, places)
    else:
        settings = _settings(selection=selection, group_size=group_size, rescale=rescale, gradient=gradient)
    requested = requested_plan(plan, places, sites)
    check_requested(plan, requested, places, settings)
    _attach_all(hosts, settings)
    set_sparsity(model, requested)
    return requested


def densify(model: nn.Module) -> None:
    """Take Q-Sparse out of ``model``, which is then what it was before ``sparsify``, with its present weights.

    Raises:
        ConfigError: the model is not sparse.
    """
    _require_sites(model, "densify")
    experts = _experts()
    for module in model.modules():
        hooks.detach(module)
        experts.detach(module)
    decoder = find_decoder(model)
    delattr(decoder, _PLAN)
    # Models may share one configuration, of which another one has removed it already.
    vars(decoder.config).pop(CONFIG_KEY, None)


def set_sparsity(model: nn.Module, plan: Requested) -> None:
    """Set S of a sparse model, from the next forward pass on; the selection and its other settings stay.

    Args:
        model: a model after ``sparsify``.
        plan: as in ``sparsify``; with selection by threshold it must have the thresholds of its S.

    Raises:
        ConfigError: the model is not sparse, or the plan does not fit it.
    """
    sites = _require_sites(model, "set_sparsity")
    places = site_places(model)
    settings = next(iter(sites.values())).settings
    requested = requested_plan(plan, places)
    check_requested(plan, requested, places, settings)
    for place, site in sites.items():
        site.set_sparsity(requested.values[place], requested.thresholds.get(place))
    decoder = find_decoder(model)
    setattr(decoder, _PLAN, requested)
    setattr(decoder.config, CONFIG_KEY, to_config(requested, settings))


def current_plan(model: nn.Module) -> SparsityPlan:
    """Return the plan of a sparse model, thresholds included.

    Raises:
        ConfigError: the model is not sparse.
    """
    _require_sites(model, "current_plan")
    plan: SparsityPlan = getattr(find_decoder(model), _PLAN)
    return plan


def sites_of(model: nn.Module) -> dict[LayerSite, SparseSite]:
    """Return the sparse sites of a model by layer and name; none if the model is not sparse."""
    found = {}
    for module in model.modules():
        if isinstance(module, SparseSite) and module.layer is not None:
            found[module.layer, module.site] = module
    return found


def site_places(model: nn.Module) -> dict[LayerSite, Place]:
    """Return the size of every sparse site of a model."""
    return {place: Place(site.num_features, site.num_experts) for place, site in sites_of(model).items()}


def _require_sites(model: nn.Module, caller: str) -> dict[LayerSite, SparseSite]:
    sites = sites_of(model)
    if not sites:
        raise ConfigError(f"{caller}: {type(model).__name__} is not sparse; call sparsify first")
    return sites


def _settings(**values: Any) -> SparsityConfig:
    # blend has a schedule of its own, which only our training loop follows.
    if values["gradient"] not in ("ste", "masked"):
        raise ConfigError(f"sparsify: gradient ({show(values['gradient'])}) must be ste or masked; choose one of them")
    try:
        return SparsityConfig.model_validate(values)
    except ValidationError as error:
        raise invalid_setting("sparsify", error) from None


def _kept(model: nn.Module, places: dict[LayerSite, Place]) -> tuple[SparsityPlan, SparsityConfig]:
    entry = getattr(find_decoder(model).config, CONFIG_KEY, None)
    if entry is None:
        raise ConfigError(
            f"sparsify: the configuration of {type(model).__name__} contains no plan ({CONFIG_KEY}), because it was "
            "not saved while it was sparse; give a plan, such as 0.5"
        )
    return from_config(entry, places)


def _attach_all(hosts: list[Host], settings: SparsityConfig) -> None:
    experts = _experts()
    for host in hosts:
        input_site, hidden_site = (
            _site(host.layer, site, place, settings)
            for site, place in ((host.input_site, host.input_place), (host.hidden_site, host.hidden_place))
        )
        if host.projection is None:
            model_config: Any = host.module.config
            experts.attach(host.module, experts.SparseExperts(input_site, hidden_site, model_config))
        else:
            hooks.attach(host.module, host.projection, input_site, hidden_site)


def _site(layer: int, name: Any, place: Place, settings: SparsityConfig) -> SparseSite:
    site = SparseSite(name, place.num_features, settings, select_rows, num_experts=place.num_experts)
    site.layer = layer
    return site


def _experts() -> Any:
    """Return the module with the experts, which imports transformers."""
    try:
        from qsparse_moe.interop.drop_in import experts
    except ImportError as error:
        raise BackendUnavailable(
            f"sparsify needs transformers with an experts interface, version 5 or later ({error}); pip install "
            "'transformers>=5'"
        ) from None
    return experts
