"""The sparsity plan: S for every (layer, site, expert), K derived from it, and experts per token by layer.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist

from qsparse_moe.config.presets import PRESETS
from qsparse_moe.config.schema import ModelConfig, Site, SparsityConfig
from qsparse_moe.config.shapes import EXPERT_SITES, site_sparsity, site_width
from qsparse_moe.errors import ConfigError, naming
from qsparse_moe.sparsity.plan_json import read_json, write_json
from qsparse_moe.sparsity.plan_overrides import apply_override, model_places, routing_settings
from qsparse_moe.sparsity.plan_routing import check_at_most, check_routing, scaled_experts


def num_selected(sparsity: float, num_features: int) -> int:
    """Return K = max(1, round((1 - S) * D)), the selected features per row of D (arXiv 2407.10969, section 2).

    Halves are rounded to the even neighbour, as by Python's ``round``.
    """
    return max(1, round((1.0 - sparsity) * num_features))


def site_num_selected(settings: SparsityConfig, sparsity: float, num_features: int) -> int:
    """Return K per row of a site with ``num_features`` features; under block selection the sum over its groups.

    Under threshold and statistical selection K is only the target: the number of selected features varies around it
    from row to row. ReLU does not use K.
    """
    # At S = 0 nothing is selected, so the group size need not divide the width of the site.
    if settings.selection != "block" or sparsity == 0.0:
        return num_selected(sparsity, num_features)
    return num_selected(sparsity, settings.group_size) * (num_features // settings.group_size)


def site_threshold(settings: SparsityConfig, sparsity: float, threshold: float) -> float:
    """Return the number that ``selection.THRESHOLD_MASKS`` compares with.

    It is the calibrated threshold, the quantile of the standard normal distribution at S, or 0 for ReLU. At S = 0 it is
    ``-inf``, which selects every feature.
    """
    if sparsity == 0.0:
        return -math.inf
    if settings.selection == "relu":
        return 0.0
    return threshold if settings.selection == "threshold" else NormalDist().inv_cdf(sparsity)


@dataclass(frozen=True)
class SparsityPlan:
    """S, the fraction of features set to zero, for every (layer, site, expert) of a model, and experts per token.

    ``values[layer, site]`` holds one S, or one S per expert at ``expert_input`` and ``expert_hidden``. ``thresholds``
    holds, for each S, the magnitude below which that fraction lies; it is empty unless the plan was calibrated.

    ``experts_per_token[layer]`` is the number of a token's experts that a MoE layer uses, in the order in which the
    router chooses them: from 0, with which shared experts and the residual stream remain, to the A of the model, which
    a layer without an entry uses. ``top_p[layer]`` in (0, 1] reduces it further, token by token: to the fewest first
    experts whose router weights reach this share of the sum of all A, at least one.
    """

    values: Mapping[tuple[int, Site], tuple[float, ...]]
    thresholds: Mapping[tuple[int, Site], tuple[float, ...]] = field(default_factory=dict)
    experts_per_token: Mapping[int, int] = field(default_factory=dict)
    top_p: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies, so that a caller who goes on changing its mappings does not change a frozen plan.
        for name in ("values", "thresholds", "experts_per_token", "top_p"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        self._check_thresholds()
        check_routing(self.values, self.experts_per_token, self.top_p)
        for (layer, site), values in self.values.items():
            if not all(0.0 <= value < 1.0 for value in values):
                raise ConfigError(
                    f"sparsity plan: layer {layer}, {site} has S = {list(values)}; each must lie in [0, 1); "
                    "0 keeps every feature"
                )

    @classmethod
    def uniform(cls, config: ModelConfig, sparsity: float) -> SparsityPlan:
        """Return the plan with the same S at every site of the model that ``config`` describes."""
        return cls({place: (sparsity,) * width for place, width in model_places(config)})

    @classmethod
    def preset(cls, config: ModelConfig, name: str) -> SparsityPlan:
        """Return the plan with the S of a preset: ``paper``, ``a4.8``, or ``dense``. Number formats are not included.

        Raises:
            ConfigError: there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"sparsity plan: {name!r} is not a preset; choose from {', '.join(PRESETS)}")
        chosen = PRESETS[name].sparsity
        return cls({(layer, site): (chosen.get(site, 0.0),) * width for (layer, site), width in model_places(config)})

    @classmethod
    def from_config(cls, config: ModelConfig) -> SparsityPlan:
        """Return the plan of ``config.sparsity``: its file, or its preset, default, sites, and overrides in this order.

        Experts per token are those of the file, or of the settings and their overrides in this order.

        Raises:
            ConfigError: an override names a layer, site or expert that the model lacks; the plan file cannot be read or
                was made for another model.
        """
        settings = config.sparsity
        if settings.plan is not None:
            plan = cls.load(settings.plan)
            plan.check_fits(config, file=settings.plan)
            return plan
        values = {
            (layer, site): (site_sparsity(settings, site),) * width for (layer, site), width in model_places(config)
        }
        for index, override in enumerate(settings.overrides):
            path = f"model.sparsity.overrides.{index}"
            try:
                matched = apply_override(values, override, config)
            except ValueError as error:
                raise ConfigError(f"{path} {error}") from None
            if not matched:
                sites = sorted({site for _, site in values})
                raise ConfigError(
                    f"{path} ({override.model_dump(exclude_none=True)}) matches nothing; "
                    f"this model has layers 0-{config.num_layers - 1} with the sites {', '.join(sites)}"
                )
        return cls(values, {}, *routing_settings(config))

    @classmethod
    def from_json(cls, text: str) -> SparsityPlan:
        """Return the plan that ``to_json`` wrote; a plan of an earlier format has the model's experts per token.

        Raises:
            ConfigError: the text is not a plan in a format that this version reads.
        """
        return cls(*read_json(text))

    @classmethod
    def load(cls, path: str | Path) -> SparsityPlan:
        """Return the plan in the file ``path``, which ``save`` wrote.

        Raises:
            ConfigError: the file cannot be read, or does not contain a plan in the format of this version.
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
        """Return the plan as JSON, with the name and version of its format."""
        return write_json(self.values, self.thresholds, self.experts_per_token, self.top_p)

    def sites(self, layer: int) -> tuple[Site, ...]:
        """Return the sites of ``layer``."""
        return tuple(site for other, site in self.values if other == layer)

    def sparsity(self, layer: int, site: Site, expert: int | None = None) -> float:
        """Return S of one site and expert, or the mean over the experts if ``expert`` is None."""
        values = self.values[layer, site]
        return sum(values) / len(values) if expert is None else values[expert]

    def experts(self, layer: int, default: int) -> int:
        """Return the largest number of experts of a token in ``layer``; ``default`` is the A of the model."""
        return self.experts_per_token.get(layer, default)

    def scaled(self, scale: float, experts_per_token: int | None = None) -> SparsityPlan:
        """Return the plan on the way from the dense model (``scale`` 0) to this plan (``scale`` 1).

        Every S is multiplied by ``scale``. The number of experts moves from ``experts_per_token``, the A of the model,
        to that of the plan, rounded, and the share of ``top_p`` from 1. Thresholds remain only if ``scale`` is 1.
        """
        if scale == 1.0:
            return self
        # A threshold belongs to one value of S, so it is not valid for another.
        values = {place: tuple(scale * v for v in values) for place, values in self.values.items()}
        top_p = {layer: 1.0 - scale * (1.0 - share) for layer, share in self.top_p.items()}
        return SparsityPlan(values, {}, scaled_experts(self.experts_per_token, scale, experts_per_token), top_p)

    def with_thresholds(self, thresholds: Mapping[tuple[int, Site], tuple[float, ...]]) -> SparsityPlan:
        """Return the plan with these thresholds instead of its own."""
        return replace(self, thresholds=thresholds)

    def with_experts(self, experts_per_token: Mapping[int, int]) -> SparsityPlan:
        """Return the plan with these numbers of experts per token by layer; those of other layers stay.

        Raises:
            ConfigError: a number is negative, or a layer has no routed experts.
        """
        return replace(self, experts_per_token={**self.experts_per_token, **experts_per_token})

    def with_top_p(self, top_p: Mapping[int, float]) -> SparsityPlan:
        """Return the plan with these shares of the router weight by layer; those of other layers stay.

        Raises:
            ConfigError: a share is not in (0, 1], or a layer has no routed experts.
        """
        return replace(self, top_p={**self.top_p, **top_p})

    def with_(
        self,
        *,
        sparsity: float,
        layer: int | None = None,
        site: Site | None = None,
        experts: Sequence[int] | None = None,
    ) -> SparsityPlan:
        """Return a new plan with S = ``sparsity`` at the named sites, whose thresholds are removed.

        Args:
            sparsity: in [0, 1).
            layer: index, counted from 0; None is every layer.
            site: name; None is every site of the layer.
            experts: indices, counted from 0; only sites that have one S per expert are changed. None is all experts.

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
                f"sparsity plan: layer {layer}, site {site}, experts {experts} matches nothing; this plan has the "
                f"layers {layers} with the sites {', '.join(sites)}, and S per expert only at "
                f"{' and '.join(sorted(EXPERT_SITES))}"
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
        # A threshold belongs to one value of S, as in scaled.
        thresholds = {place: own for place, own in self.thresholds.items() if place not in places}
        return replace(self, values=values, thresholds=thresholds)

    @property
    def mean(self) -> float:
        """Mean of S over layers and sites. Every site has the same weight, regardless of its number of experts."""
        if not self.values:
            return 0.0
        return sum(sum(values) / len(values) for values in self.values.values()) / len(self.values)

    def check_fits(self, config: ModelConfig, *, file: str | Path | None = None) -> None:
        """Raise ConfigError unless the plan fits the model that ``config`` describes; it names ``file`` if given.

        The plan must have exactly the layers, sites, and experts of the model. Under block selection the group size
        must divide the width of every sparse site; under threshold selection every sparse site needs thresholds. A
        router that reads sparse tokens requires the same S for all experts at ``expert_input``. No layer may use more
        experts per token than the A of the model.
        """
        try:
            self._check_fits(config)
        except ConfigError as error:
            # A command may read several plans, and a run names its own far from where it is read.
            raise (ConfigError(f"{file}: {error}") if file is not None else error) from None

    def _check_fits(self, config: ModelConfig) -> None:
        want = dict(model_places(config))
        have = {place: len(values) for place, values in self.values.items()}
        for place in sorted(want.keys() | have.keys()):
            if want.get(place) != have.get(place):
                layer, site = place
                raise ConfigError(
                    f"sparsity plan: layer {layer}, {site} has {have.get(place, 0)} values, but the model needs "
                    f"{want.get(place, 0)}; make the plan from the configuration of this model"
                )
        for place, values in self.values.items():
            # A site whose experts all have S = 0 selects nothing: groups and thresholds need not fit it.
            if any(values):
                self._check_selection(config, *place)
            if config.moe.router_input == "sparse" and place[1] == "expert_input" and len(set(values)) > 1:
                raise ConfigError(
                    f"sparsity plan: layer {place[0]}, expert_input has S = {list(values)}, but the router can read "
                    "sparse tokens (model.moe.router_input) only if all experts have the same S; set router_input to "
                    "dense, or use a plan with one S for all of them"
                )
        check_at_most(self.experts_per_token, config)

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


def check_not_dense(plan: SparsityPlan, model: Path) -> None:
    """Raise ConfigError if S is 0 at every site of ``plan``, which is to be calibrated for the model of a folder."""
    if not plan.mean:
        raise ConfigError(
            f"{model}: S is 0 at every site, so there is no threshold to calibrate; give another S by --sparsity, "
            "--plan or model.sparsity.default"
        )
