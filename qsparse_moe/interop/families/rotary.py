"""The rotary frequencies of a ``config.json``, which older files describe in ``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

import math
from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.config.rotary_schema import RopeScalingConfig
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.interop.families.settings import FamilySettings

# Our name and that of the file for every setting of a type that can be read.
_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {"factor": "factor", "original_length": "original_max_position_embeddings"},
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}
# Settings of the section that do not belong to a type. The last one is off at 1.
_COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


def rotary_settings(source: FamilySettings, *, rope_theta: float, scales_scores: bool = False) -> dict[str, Any]:
    """Return our settings ``rope_theta`` and ``rope_scaling``.

    Args:
        source: the settings of the file.
        rope_theta: the default of the family.
        scales_scores: whether the family multiplies its attention scores by the square of what YaRN's
            ``mscale_all_dim`` gives, as DeepSeek's models do.

    Raises:
        CheckpointError: the frequencies are of another type, or a setting of them is unknown or invalid.
    """
    top = source.optional("rope_theta")
    name, section = _section(source)
    base = section.get("rope_theta", rope_theta if top is None else top)
    if top is not None and top != base:
        raise source.refusal("rope_theta", f"differs from {name}.rope_theta ({show(base)})", "remove one of the two")
    theta = source.positive(name if "rope_theta" in section else "rope_theta", base)
    return {"rope_theta": theta, "rope_scaling": _scaling(source, name, section, scales_scores)}


def rotary_json(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a ``config.json``, in the form that programs of any age read; see ``rotary_settings``."""
    scaling = config.rope_scaling
    if scaling.type == "none":
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    values = {theirs: getattr(scaling, ours) for ours, theirs in _TYPES[scaling.type].items()}
    if scaling.type == "yarn":
        values |= _yarn_json(scaling)
    return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": scaling.type} | values}


def _section(source: FamilySettings) -> tuple[str, dict[str, Any]]:
    """Return the name of the section and its values, empty if there is none."""
    given = {name: source.optional(name) for name in ("rope_parameters", "rope_scaling")}
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise source.refusal(
            "rope_scaling", "stands beside rope_parameters, and one must describe both", "remove one of the two"
        )
    name, section = next(iter(found.items()), ("rope_theta", {}))
    if not isinstance(section, dict):
        raise source.refusal(name, "must be an object of JSON", "correct it, or download the file again")
    return name, section


def _scaling(source: FamilySettings, name: str, section: dict[str, Any], scales_scores: bool) -> dict[str, Any]:
    kind = section.get("rope_type", section.get("type", "default"))
    names = _TYPES.get(kind) if isinstance(kind, str) else None
    if names is None:
        raise source.refusal(
            name,
            f"must have one of these types: {', '.join(_TYPES)}",
            "other rotary frequencies change the result and are not supported; name another model",
        )
    unknown = sorted(section.keys() - {*_COMMON, *names.values(), *_OPTIONAL.get(str(kind), ())})
    if unknown or section.get("partial_rotary_factor", 1) != 1:
        raise source.refusal(
            name,
            f"has a setting that is not known for the type {kind}: {(unknown or ['partial_rotary_factor'])[0]}",
            "it may change the result, so it is not ignored",
        )
    values = dict(section)
    if "original_length" in names:
        # The default of transformers.
        values.setdefault(names["original_length"], source.max_length)
    missing = [theirs for theirs in names.values() if values.get(theirs) is None]
    if missing:
        raise source.refusal(name, f"lacks {missing[0]}, which {kind} needs", "download the file again")
    scaling: dict[str, Any] = {ours: source.positive(name, values[theirs]) for ours, theirs in names.items()}
    if "original_length" in scaling:
        scaling["original_length"] = values[names["original_length"]]
    if kind == "yarn":
        scaling |= _yarn(source, name, section, scales_scores)
    return {"type": "none" if kind == "default" else kind} | scaling


def _yarn(source: FamilySettings, name: str, section: dict[str, Any], scales_scores: bool) -> dict[str, Any]:
    """Return the optional settings of YaRN; a null, and a 0 of mscale and mscale_all_dim, count as absent."""
    given = {key: value for key, value in section.items() if key in _OPTIONAL["yarn"] and value is not None}
    if given.pop("truncate", True) is not True:
        raise source.refusal(
            name,
            "must have truncate true or absent",
            "channels that are not whole change the frequencies and are not supported; name another model",
        )
    values = {key: source.positive(name, value) for key, value in given.items() if value != 0 or "mscale" not in key}
    mscale, all_dim = (values.pop(key, None) for key in ("mscale", "mscale_all_dim"))
    factor = source.positive(name, section["factor"])
    if mscale and all_dim:
        values.setdefault("attention_factor", _magnitude(factor, mscale) / _magnitude(factor, all_dim))
    if all_dim and scales_scores:
        values["score_factor"] = _magnitude(factor, all_dim) ** 2
    return values


def _yarn_json(scaling: RopeScalingConfig) -> dict[str, Any]:
    """Return the optional settings that ``_yarn`` reads."""
    values: dict[str, Any] = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    if scaling.score_factor != 1:
        values["mscale_all_dim"] = _mscale(scaling.factor, scaling.score_factor)
    if scaling.attention_factor == 1 and "mscale_all_dim" in values:
        # As DeepSeek's files have it, whose readers do not know an attention_factor.
        values["mscale"] = values["mscale_all_dim"]
    elif scaling.attention_factor is not None:
        values["attention_factor"] = scaling.attention_factor
    return values


def _mscale(factor: float, score_factor: float) -> float:
    """Return the ``mscale_all_dim`` that gives ``score_factor``, as short as its author wrote it if that is exact."""
    exact = (math.sqrt(score_factor) - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
    short = float(f"{exact:.6g}")
    return short if _magnitude(factor, short) ** 2 == score_factor else exact


def _magnitude(factor: float, mscale: float) -> float:
    """Return ``yarn_get_mscale`` of DeepSeek's code, with which queries and keys grow."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
