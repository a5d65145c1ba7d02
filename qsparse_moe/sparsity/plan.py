"""S for every (layer, site, expert) of a model, and K from it. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from qsparse_moe.config.presets import PRESETS
from qsparse_moe.config.schema import ModelConfig, Site, SparsityConfig, SparsityOverride
from qsparse_moe.config.selectors import select
from qsparse_moe.config.shapes import EXPERT_SITES, layer_sites, site_sparsity, site_width
from qsparse_moe.errors import ConfigError, naming

FORMAT = "qsparse_moe.sparsity_plan/2"


def num_kept(sparsity: float, num_features: int) -> int:
    """K = max(1, round((1 - S) * D)): the features that a row of ``num_features`` keeps (arXiv 2407.10969, section 2).

    Halves round to the even neighbour, as Python's ``round`` does.
    """
    return max(1, round((1.0 - sparsity) * num_features))


def site_num_kept(settings: SparsityConfig, sparsity: float, num_features: int) -> int:
    """K of a site with ``num_features``: of the whole row, or under block selection the sum over its groups.

    Under threshold and statistical selection it is what S asks for; how many a row keeps varies around it. Under relu
    it bears on nothing.
    """
    # Groups need not divide a site that is left whole.
    if settings.selection != "block" or sparsity == 0.0:
        return num_kept(sparsity, num_features)
    return num_kept(sparsity, settings.group_size) * (num_features // settings.group_size)


def site_threshold(settings: SparsityConfig, sparsity: float, threshold: float) -> float:
    """Return what ``selection.THRESHOLD_MASKS`` compares with: a threshold, a normal quantile at S, or ReLU's 0.

    ``-inf`` where S is 0, which keeps everything.
    """
    if sparsity == 0.0:
        return -math.inf
    if settings.selection == "relu":
        return 0.0
    return threshold if settings.selection == "threshold" else NormalDist().inv_cdf(sparsity)


@dataclass(frozen=True)
class SparsityPlan:
    """S, the fraction zeroed, at every place of a model.

    ``values[layer, site]`` holds one S, or one S an expert at ``expert_input`` and ``expert_hidden``.
    ``thresholds``, empty unless the plan was calibrated, holds beside each S the magnitude below which that share lies.
    """

    values: Mapping[tuple[int, Site], tuple[float, ...]]
    thresholds: Mapping[tuple[int, Site], tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", dict(self.values))
        object.__setattr__(self, "thresholds", dict(self.thresholds))
        self._check_thresholds()
        for (layer, site), values in self.values.items():
            if not all(0.0 <= value < 1.0 for value in values):
                raise ConfigError(
                    f"sparsity plan: layer {layer}, {site} has S = {list(values)}; each must lie in [0, 1); "
                    "0 keeps every feature"
                )

    @classmethod
    def uniform(cls, config: ModelConfig, sparsity: float) -> SparsityPlan:
        """The same S at every place of the model that ``config`` describes."""
        return cls({place: (sparsity,) * width for place, width in _places(config)})

    @classmethod
    def preset(cls, config: ModelConfig, name: str) -> SparsityPlan:
        """The S of a preset, ``paper``, ``a4.8`` or ``dense``, at every place of the model; formats are no part of it.

        Raises:
            ConfigError: there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"sparsity plan: {name!r} is no preset; choose from {', '.join(PRESETS)}")
        chosen = PRESETS[name].sparsity
        return cls({(layer, site): (chosen.get(site, 0.0),) * width for (layer, site), width in _places(config)})

    @classmethod
    def from_config(cls, config: ModelConfig) -> SparsityPlan:
        """The plan of ``config.sparsity``: its file, or its preset, default, sites and overrides, later ones winning.

        Raises:
            ConfigError: an override names a layer, site or expert that the model lacks; the plan file cannot be read or
                was made for another model.
        """
        settings = config.sparsity
        if settings.plan is not None:
            plan = cls.load(settings.plan)
            plan.check_fits(config)
            return plan
        values = {(layer, site): (site_sparsity(settings, site),) * width for (layer, site), width in _places(config)}
        for index, override in enumerate(settings.overrides):
            path = f"model.sparsity.overrides.{index}"
            try:
                matched = _apply(values, override, config)
            except ValueError as error:
                raise ConfigError(f"{path} {error}") from None
            if not matched:
                sites = sorted({site for _, site in values})
                raise ConfigError(
                    f"{path} ({override.model_dump(exclude_none=True)}) matches nothing; "
                    f"this model has layers 0-{config.num_layers - 1} with the sites {', '.join(sites)}"
                )
        return cls(values)

    @classmethod
    def from_json(cls, text: str) -> SparsityPlan:
        """The plan that ``to_json`` wrote.

        Raises:
            ConfigError: the text is no plan of this version.
        """
        try:
            content = json.loads(text)
            version, entries = content["format"], content["values"]
            values, thresholds = _numbers(entries, "sparsity"), _numbers(entries, "threshold")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"sparsity plan: not readable ({error!r}); write one with SparsityPlan.to_json") from None
        if version != FORMAT:
            raise ConfigError(f"sparsity plan: format is {version!r}; this version reads {FORMAT!r}; write it anew")
        return cls(values, thresholds)

    @classmethod
    def load(cls, path: str | Path) -> SparsityPlan:
        """The plan in the file ``path``, which ``save`` wrote.

        Raises:
            ConfigError: the file cannot be read, or holds no plan of this version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as a sparsity plan ({error}); name a file that exists") from None
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON to ``path``, for ``model.sparsity.plan``."""
        with naming(Path(path)):
            Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """The plan as JSON, with the name and version of its format."""
        entries = []
        for place, values in self.values.items():
            entry: dict[str, Any] = {"layer": place[0], "site": place[1], "sparsity": list(values)}
            if place in self.thresholds:
                entry["threshold"] = list(self.thresholds[place])
            entries.append(entry)
        return json.dumps({"format": FORMAT, "values": entries}, indent=1)

    def sites(self, layer: int) -> tuple[Site, ...]:
        """The sites of ``layer``."""
        return tuple(site for other, site in self.values if other == layer)

    def sparsity(self, layer: int, site: Site, expert: int | None = None) -> float:
        """S of one place; the mean over the experts where ``expert`` is None."""
        values = self.values[layer, site]
        return sum(values) / len(values) if expert is None else values[expert]

    def scaled(self, scale: float) -> SparsityPlan:
        """The plan with every S multiplied by ``scale`` in [0, 1]; thresholds hold for one S only and go with it."""
        values = {place: tuple(scale * v for v in values) for place, values in self.values.items()}
        return SparsityPlan(values, self.thresholds if scale == 1.0 else {})

    def with_thresholds(self, thresholds: Mapping[tuple[int, Site], tuple[float, ...]]) -> SparsityPlan:
        """The plan with these thresholds in place of its own."""
        return SparsityPlan(self.values, thresholds)

    def with_(
        self,
        *,
        sparsity: float,
        layer: int | None = None,
        site: Site | None = None,
        experts: Sequence[int] | None = None,
    ) -> SparsityPlan:
        """Return a new plan with S = ``sparsity`` at the places that are named; the thresholds of these go.

        Args:
            sparsity: in [0, 1).
            layer: counted from 0; every layer where it is None.
            site: every site of the layer where it is None.
            experts: numbers of experts, counted from 0; only sites that have one S per expert are changed then.

        Raises:
            ConfigError: the plan has no such layer, site or expert, or ``sparsity`` is out of range.
        """
        places = [place for place in self.values if layer in (None, place[0]) and site in (None, place[1])]
        if experts is not None:
            places = [place for place in places if place[1] in EXPERT_SITES]
        if not places:
            layers = sorted({place[0] for place in self.values})
            sites = list(dict.fromkeys(place[1] for place in self.values))
            raise ConfigError(
                f"sparsity plan: layer {layer}, site {site}, experts {experts} names no place; this plan has the "
                f"layers {layers} with the sites {', '.join(sites)}, and experts at {' and '.join(EXPERT_SITES)} only"
            )
        values = dict(self.values)
        for place in places:
            count = len(values[place])
            chosen = range(count) if experts is None else experts
            if wrong := [expert for expert in chosen if not 0 <= expert < count]:
                raise ConfigError(
                    f"sparsity plan: experts {wrong} are not in layer {place[0]}, {place[1]}; choose from 0-{count - 1}"
                )
            values[place] = tuple(sparsity if i in chosen else value for i, value in enumerate(values[place]))
        return SparsityPlan(values, {place: kept for place, kept in self.thresholds.items() if place not in places})

    @property
    def mean(self) -> float:
        """The mean of S over layers and sites, each site weighing the same whatever its number of experts."""
        if not self.values:
            return 0.0
        return sum(sum(values) / len(values) for values in self.values.values()) / len(self.values)

    def check_fits(self, config: ModelConfig) -> None:
        """Raise ConfigError unless the plan has exactly the places of the model that ``config`` describes.

        Under block selection the groups must divide every site that is sparse, under threshold selection each must have
        its thresholds, and a router that sees the sparse tokens needs the same S for all experts at ``expert_input``.
        """
        want = dict(_places(config))
        have = {place: len(values) for place, values in self.values.items()}
        for place in sorted(want.keys() | have.keys()):
            if want.get(place) != have.get(place):
                layer, site = place
                raise ConfigError(
                    f"sparsity plan: layer {layer}, {site} has {have.get(place, 0)} values, the model needs "
                    f"{want.get(place, 0)}; make the plan from this model's config"
                )
        for place, values in self.values.items():
            if any(values):
                self._check_selection(config, *place)
            if config.moe.router_input == "sparse" and place[1] == "expert_input" and len(set(values)) > 1:
                raise ConfigError(
                    f"sparsity plan: layer {place[0]}, expert_input has S = {list(values)}, and the router can see the "
                    "sparse tokens (model.moe.router_input) only where all experts have the same; set router_input to "
                    "dense, or use a plan that treats them alike"
                )

    def _check_selection(self, config: ModelConfig, layer: int, site: Site) -> None:
        settings, width = config.sparsity, site_width(config, site)
        if settings.selection == "block" and width % settings.group_size:
            raise ConfigError(
                f"sparsity plan: layer {layer}, {site} has S above 0 and {width} features, which "
                f"model.sparsity.group_size ({settings.group_size}) must divide; set S to 0 there or use other groups"
            )
        if settings.selection == "threshold" and (layer, site) not in self.thresholds:
            raise ConfigError(
                f"sparsity plan: layer {layer}, {site} has S above 0 and no threshold, which model.sparsity.selection "
                "(threshold) needs; calibrate the plan with qsparse-moe calibrate"
            )

    def _check_thresholds(self) -> None:
        for (layer, site), thresholds in self.thresholds.items():
            expected = len(self.values.get((layer, site), ()))
            if len(thresholds) != expected or not all(0.0 <= value < math.inf for value in thresholds):
                raise ConfigError(
                    f"sparsity plan: layer {layer}, {site} has thresholds {list(thresholds)}; there must be one for "
                    f"each of its {expected} values of S, finite and at least 0; calibrate the plan again with "
                    "qsparse-moe calibrate"
                )


def _numbers(entries: list[dict[str, Any]], key: str) -> dict[tuple[int, Site], tuple[float, ...]]:
    """What the entries of a file hold under ``key``, by place; every entry holds S."""
    having = [entry for entry in entries if key == "sparsity" or key in entry]
    return {(int(entry["layer"]), entry["site"]): tuple(float(v) for v in entry[key]) for entry in having}


def _places(config: ModelConfig) -> Iterator[tuple[tuple[int, Site], int]]:
    for layer in range(config.num_layers):
        for site in layer_sites(config, layer):
            yield (layer, site), config.moe.num_experts if site in EXPERT_SITES else 1


def _apply(values: dict[tuple[int, Site], tuple[float, ...]], override: SparsityOverride, config: ModelConfig) -> bool:
    """Write ``override`` into ``values``; whether it matched any place. ValueError names what is out of range."""
    layers = _select_named("layers", override.layers, config.num_layers)
    experts = _select_named("experts", override.experts, config.moe.num_experts)
    matched = False
    for place in values:
        layer, site = place
        per_expert = site in EXPERT_SITES
        if (
            layer not in layers
            or override.site not in (None, site)
            or (override.experts is not None and not per_expert)
        ):
            continue
        chosen = experts if per_expert else (0,)
        values[place] = tuple(override.sparsity if i in chosen else v for i, v in enumerate(values[place]))
        matched = True
    return matched


def _select_named(name: str, selector: int | str | Sequence[int] | None, count: int) -> tuple[int, ...]:
    try:
        return select(selector, count)
    except ValueError as error:
        raise ValueError(f"{name} ({selector!r}) {error}") from None
