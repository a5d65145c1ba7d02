"""Rules of the model section: attention heads and Q-Sparse; the rules of the experts are in ``moe_rules.py``.

Letters: D width, H heads, C channels per head, G group, S sparsity.

Block selection selects ``max(1, round((1 - S) * G))`` features of every group, the same rounding as everywhere. An S
that would round to no feature is refused, because the one that is then selected contradicts S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qsparse_moe.config.attention_rules import LATENT_RULES
from qsparse_moe.config.moe_rules import MOE_RULES
from qsparse_moe.config.presets import PRESETS
from qsparse_moe.config.problems import Problem, show
from qsparse_moe.config.rotary_rules import ROTARY_RULES
from qsparse_moe.config.schema import SITES, BlendConfig, ModelConfig, Site, SparsityOverride
from qsparse_moe.config.selectors import select
from qsparse_moe.config.shapes import (
    EXPERT_SITES,
    latent_sizes,
    layer_sites,
    model_sites,
    moe_layers,
    site_sparsity,
    site_width,
    site_width_setting,
)
from qsparse_moe.config.shared_selection_rules import SHARED_SELECTION_RULES


def _heads(config: ModelConfig) -> Iterator[Problem]:
    width, heads = config.hidden_size, config.num_heads
    # Latent attention has head sizes of its own, and a rule that refuses this one.
    if latent_sizes(config):
        return
    if config.head_size is not None:
        if config.head_size % 2:
            yield Problem(
                f"model.head_size ({config.head_size}) must be even, because the rotary embedding rotates pairs of "
                f"channels; {config.head_size + 1} is even",
                ("model.head_size",),
            )
    elif width % heads or width // heads % 2:
        fitting = [number for number in divisors(width) if width // number % 2 == 0]
        # A width that is odd has no division into heads of an even size.
        found = f"{nearest(heads, fitting)}, " if fitting else ""
        yield Problem(
            f"model.num_heads ({heads}) must divide model.hidden_size ({width}) into heads of an even size when "
            f"model.head_size is null; {found}or set model.head_size",
            ("model.num_heads", "model.hidden_size", "model.head_size"),
        )


def _kv_heads(config: ModelConfig) -> Iterator[Problem]:
    kv_heads, heads = config.num_kv_heads, config.num_heads
    if kv_heads is not None and heads % kv_heads:
        yield Problem(
            f"model.num_kv_heads ({kv_heads}) must divide model.num_heads ({heads}); "
            f"{nearest(kv_heads, divisors(heads))}",
            ("model.num_kv_heads", "model.num_heads"),
        )


def _sites_exist(config: ModelConfig) -> Iterator[Problem]:
    existing = model_sites(config)
    sparsity = config.sparsity
    for section, values in (("sites", sparsity.sites), ("quantization.sites", sparsity.quantization.sites)):
        for site in SITES:
            value, path = getattr(values, site), f"model.sparsity.{section}.{site}"
            # 0 and none have no effect, so a file may give them for sites that another model has.
            if value not in (None, 0, "none") and site not in existing:
                yield Problem(
                    f"{path} ({value}) selects nothing: {_why_absent(config, site)}; remove it, or choose from "
                    f"{', '.join(existing)}",
                    (path, *_EXISTENCE),
                )


# The settings that decide which sites a model has: where one of them is invalid, a rule about sites is not reported.
_EXISTENCE = tuple(f"model.moe.{name}" for name in ("num_shared_experts", "num_dense_layers", "moe_layer_interval"))


def _why_absent(config: ModelConfig, site: Site) -> str:
    moe = config.moe
    if site.startswith("dense"):
        return "model.moe.num_dense_layers is 0 and model.moe.moe_layer_interval 1"
    if not moe_layers(config):
        return (
            f"every layer is dense (model.moe.num_dense_layers is {moe.num_dense_layers}, "
            f"model.moe.moe_layer_interval {moe.moe_layer_interval})"
        )
    return "model.moe.num_shared_experts is 0"


def _overrides(config: ModelConfig) -> Iterator[Problem]:
    for index, override in enumerate(config.sparsity.overrides):
        path = f"model.sparsity.overrides.{index}"
        paths = (path, "model.num_layers", "model.moe.num_experts", *_EXISTENCE)
        for message in _override_messages(config, override, path):
            yield Problem(message, paths)


def _override_messages(config: ModelConfig, override: SparsityOverride, path: str) -> Iterator[str]:
    """Yield the problems of one override; that it matches something is checked only if its parts are valid."""
    messages = []
    for name, count in (("layers", config.num_layers), ("experts", config.moe.num_experts)):
        selector = getattr(override, name)
        try:
            select(selector, count)
        except ValueError as error:
            messages.append(f"{path}.{name} ({show(selector)}) {error}")
    if override.experts is not None and override.site not in (None, *EXPERT_SITES):
        messages.append(
            f"{path}.experts ({show(override.experts)}) selects single experts, but {path}.site ({override.site}) "
            f"has none; remove experts, or choose {' or '.join(sorted(EXPERT_SITES))}"
        )
    yield from messages or _no_match(config, override, path)


def _no_match(config: ModelConfig, override: SparsityOverride, path: str) -> Iterator[str]:
    layers = select(override.layers, config.num_layers)
    existing = {site for layer in layers for site in layer_sites(config, layer)}
    # Without a site, an override of experts applies to the sites that experts have.
    wanted = {override.site} if override.site else EXPERT_SITES if override.experts is not None else existing
    if existing & wanted:
        return
    # Parts that are not set mean all of them, and the user has not written them.
    what = override.model_dump(exclude_none=True, mode="json")
    offered = "; ".join(f"layer {layer}: {', '.join(layer_sites(config, layer))}" for layer in _representatives(config))
    yield f"{path} ({show(what)}) selects nothing; the sites of this model are, {offered}"


def _representatives(config: ModelConfig) -> list[int]:
    """Return the first layer of each type: dense, and with experts."""
    first_of: dict[tuple[Site, ...], int] = {}
    for layer in range(config.num_layers):
        first_of.setdefault(layer_sites(config, layer), layer)
    return list(first_of.values())


def _schedule(config: ModelConfig) -> Iterator[Problem]:
    schedule, path = config.sparsity.schedule, "model.sparsity.schedule"
    paths = (f"{path}.ramp_steps", f"{path}.shape")
    if schedule.shape == "constant" and schedule.ramp_steps:
        yield Problem(
            f"{path}.ramp_steps ({schedule.ramp_steps}) must be 0 when {path}.shape is constant; remove it, or choose "
            "linear, cubic or cosine",
            paths,
        )
    if schedule.shape != "constant" and not schedule.ramp_steps:
        yield Problem(
            f"{path}.ramp_steps (0) must be at least 1 when {path}.shape is {schedule.shape}; set it, or choose "
            "constant",
            paths,
        )


def _blend(config: ModelConfig) -> Iterator[Problem]:
    settings, path = config.sparsity, "model.sparsity.blend"
    blend = settings.blend
    if settings.gradient != "blend":
        for name, default in BlendConfig():
            value = getattr(blend, name)
            if value != default:
                yield Problem(
                    f"{path}.{name} ({value}) has no meaning when model.sparsity.gradient is {settings.gradient}; "
                    "remove it, or choose blend",
                    (f"{path}.{name}", "model.sparsity.gradient"),
                )
    elif blend.start != blend.end and not blend.ramp_steps:
        yield Problem(
            f"{path}.ramp_steps (0) must be at least 1 when model.sparsity.gradient is blend, to change from "
            f"{path}.start ({blend.start}) to {path}.end ({blend.end}); set it, or set both to the same value",
            (f"{path}.ramp_steps", f"{path}.start", f"{path}.end", "model.sparsity.gradient"),
        )


def _plan_file(config: ModelConfig) -> Iterator[Problem]:
    plan, path = config.sparsity.plan, "model.sparsity.plan"
    if plan is None:
        return
    # Only its existence: the content is checked when a plan is loaded, which this package cannot import.
    if not Path(plan).is_file():
        yield Problem(
            f"{path} ({plan}) must name a file that exists, written by SparsityPlan.save; correct the path, which is "
            "relative to the working directory, or remove the setting",
            (path,),
        )
    preset = [("model.sparsity.preset", config.sparsity.preset)] if config.sparsity.preset else []
    for other, value in (*preset, *_given_sparsities(config)):
        yield Problem(
            f"{other} ({show(value)}) must be unset if {path} ({plan}) is set, because the plan gives S for every "
            "site; remove one of them",
            (path, other),
        )


def _thresholds(config: ModelConfig) -> Iterator[Problem]:
    settings, path = config.sparsity, "model.sparsity.selection"
    if settings.selection != "threshold":
        return
    # Without a sparse site there is nothing to select, so a dense model needs no thresholds.
    if settings.plan is None and sparse_sites(config):
        yield Problem(
            f"{path} (threshold) needs calibrated thresholds, and model.sparsity.plan is null; name a plan made by "
            "qsparse-moe calibrate, or choose topk, block or statistical",
            (path, "model.sparsity.plan"),
        )


_NO_RAMP = {
    "threshold": "a threshold is calibrated for one S",
    "relu": "it selects the positive features whatever S is",
}


def _ramp_without_ranks(config: ModelConfig) -> Iterator[Problem]:
    selection, ramp = config.sparsity.selection, config.sparsity.schedule.ramp_steps
    if ramp and selection in _NO_RAMP:
        yield Problem(
            f"model.sparsity.schedule.ramp_steps ({ramp}) must be 0 when model.sparsity.selection is {selection}, "
            f"because {_NO_RAMP[selection]}; remove it, or choose topk, block or statistical",
            ("model.sparsity.selection", "model.sparsity.schedule.ramp_steps", "model.sparsity.schedule.shape"),
        )


def _groups_divide(config: ModelConfig) -> Iterator[Problem]:
    if config.sparsity.selection != "block":
        return
    group = config.sparsity.group_size
    sites_of: dict[tuple[str, int], list[Site]] = {}
    for site in sparse_sites(config):
        # One message per setting, because several sites usually have the width of one setting.
        sites_of.setdefault((site_width_setting(config, site), site_width(config, site)), []).append(site)
    for (setting, width), sites in sites_of.items():
        if width % group:
            yield Problem(
                f"model.sparsity.group_size ({group}) must divide {setting} ({width}), the width of "
                f"{', '.join(sites)}; {nearest(group, divisors(width))}",
                ("model.sparsity.group_size", *setting.split(" * ")),
            )


def _groups_keep_one(config: ModelConfig) -> Iterator[Problem]:
    if config.sparsity.selection != "block":
        return
    group = config.sparsity.group_size
    # Values of the preset are checked as well: groups may be smaller than those for which it was published.
    preset = PRESETS[config.sparsity.preset].sparsity.values() if config.sparsity.preset else ()
    for path, sparsity in (*(("model.sparsity.preset", value) for value in set(preset)), *_given_sparsities(config)):
        if round((1 - sparsity) * group) < 1:
            yield Problem(
                f"{path} ({sparsity}) selects {(1 - sparsity) * group:.3g} of the {group} features of a group "
                f"(model.sparsity.group_size), and it must select at least 1; use at most {1 - 1 / group:.6g}, or "
                "larger groups",
                (path, "model.sparsity.group_size"),
            )


def _given_sparsities(config: ModelConfig) -> Iterator[tuple[str, float]]:
    if config.sparsity.default is not None:
        yield "model.sparsity.default", config.sparsity.default
    for site, sparsity in config.sparsity.sites:
        if sparsity is not None:
            yield f"model.sparsity.sites.{site}", sparsity
    for index, override in enumerate(config.sparsity.overrides):
        yield f"model.sparsity.overrides.{index}.sparsity", override.sparsity


def sparse_sites(config: ModelConfig) -> tuple[Site, ...]:
    """Return the sites of the model at which S is above 0 in some layer or expert."""
    return tuple(site for site in model_sites(config) if any(_site_sparsities(config, site)))


def _site_sparsities(config: ModelConfig, site: Site) -> set[float]:
    values = {site_sparsity(config.sparsity, site)}
    for override in config.sparsity.overrides:
        if override.site not in (None, site) or (override.experts is not None and site not in EXPERT_SITES):
            continue
        # An override of all layers and experts replaces every earlier value; any other adds one.
        everywhere = override.layers is None and override.experts is None
        values = {override.sparsity} if everywhere else values | {override.sparsity}
    return values


def divisors(number: int) -> list[int]:
    """Return every divisor of ``number`` in ascending order."""
    # Up to the root: every larger divisor is the partner of a smaller one.
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(value: int, fitting: Iterable[int]) -> str:
    """Return the end of a sentence that names the one or two of ``fitting`` closest to ``value``."""
    near = sorted(sorted(fitting, key=lambda number: abs(number - value))[:2])
    if len(near) == 1:
        return f"the only one that does is {near[0]}"
    return f"the nearest that do are {near[0]} and {near[1]}"


MODEL_RULES: tuple[Callable[[ModelConfig], Iterator[Problem]], ...] = (
    _heads,
    _kv_heads,
    *ROTARY_RULES,
    *LATENT_RULES,
    *MOE_RULES,
    _sites_exist,
    _overrides,
    _schedule,
    _blend,
    _plan_file,
    _thresholds,
    _ramp_without_ranks,
    _groups_divide,
    _groups_keep_one,
    *SHARED_SELECTION_RULES,
)
