"""The schema of a grid file and its points: every variant with every setting of every axis. Imports no torch."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qsparse_moe.config.fields import unknown_setting, walk
from qsparse_moe.config.labels import LETTERS, OVERRIDES, name_of, setting_label
from qsparse_moe.config.problems import Problem, dotted, raise_if_any, show
from qsparse_moe.config.yaml_text import parse_yaml
from qsparse_moe.errors import ConfigError

GIVEN = ("training.name", "training.output_dir", "training.seed", "training.resume")
"""Settings that the grid itself gives to every run, so that a grid file must not set them."""
# Names become parts of training.name, which has the same pattern.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, Field(pattern=_NAME)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Settings = dict[str, Any] | None


# Frozen and strict as the run configuration, so that a typo is an error and not an ignored key.
class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ExtraSeeds(_Strict):
    """Seeds in addition to ``seeds``, for some points of the grid."""

    seeds: Seeds
    """The additional seeds."""
    points: Annotated[list[str], Field(min_length=1)]
    """Names of points, which are the names of runs without the seed; ``*`` matches any text."""


class GridFile(_Strict):
    """The content of a grid file: one run per variant, setting of every axis, and seed."""

    base: str
    """The config file of every run, relative to the grid file."""
    seeds: Seeds
    """The seeds: one run per point and seed."""
    settings: dict[str, Any] = {}
    """Settings of every run by dotted path, which override the base."""
    variants: Annotated[dict[Name, Settings], Field(min_length=1)] | None = None
    """Settings of each variant by name; the first is the baseline of all comparisons.

    A list of settings is allowed as well; each entry has a ``name`` or is named after its settings.
    """
    axes: dict[str, list[Any] | dict[Name, Settings]] = {}
    """A list of values by dotted path, or, under any name, named groups of settings that change together."""
    extra_seeds: list[ExtraSeeds] = []
    """Additional seeds for a part of the grid."""
    compare_dense: Annotated[int, Field(ge=1)] | None = None
    """Number of validation sequences on which every finished run is compared with itself at S = 0; None: no run is."""

    @field_validator("variants", mode="before")
    @classmethod
    def _named_variants(cls, value: Any) -> Any:
        return _by_name(value) if isinstance(value, list) else value


class Choice(NamedTuple):
    """The entry that a point takes from the variants or from one axis."""

    label: str
    """The label for legends: the name in the file, or else the settings in words."""
    paths: tuple[str, ...]
    """The settings that any entry of the same axis sets."""


@dataclass(frozen=True)
class GridPoint:
    """One point of a grid: a variant combined with one setting of every axis. Results call it a variant."""

    name: str
    """The name of its runs without the seed."""
    settings: dict[str, Any]
    """Settings of the variant and the axes, by dotted path."""
    seeds: tuple[int, ...]
    choices: tuple[Choice, ...] = ()
    """The choice of the variant and of each axis, in their order."""


def read_grid_file(path: Path) -> GridFile:
    """Read ``path`` and check everything that does not need its base config.

    Raises:
        ConfigError: the file cannot be read, an axis is empty or sets an unknown path, or two parts set the same path.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); name a grid file such as configs/ablations/paper.yaml"
        ) from None
    value, problems = parse_yaml(text, str(path))
    raise_if_any(problems, str(path))
    try:
        file = GridFile.model_validate(value)
    except ValidationError as error:
        known = ", ".join(GridFile.model_fields)
        problems = [
            Problem(
                f"{path}: {dotted(e['loc']) or 'the file'} ({show(e['input'])}): {e['msg']}; a grid file holds {known}"
            )
            for e in error.errors()
        ]
        raise_if_any(problems, str(path))
        # This line is for the type checker: the error above has at least one problem, which has been raised.
        raise
    raise_if_any([Problem(f"{path}: {message}") for message in _broken_rules(file)], str(path))
    return file


def grid_points(path: Path, file: GridFile) -> list[GridPoint]:
    """Return the points of ``file`` in its order; the last axis varies fastest.

    Raises:
        ConfigError: two points have the same name, or no point matches an entry of the extra seeds.
    """
    groups = [_choices(file.variants)] if file.variants else []
    groups += [
        _choices(_named(name, axis), None if isinstance(axis, dict) else name) for name, axis in file.axes.items()
    ]
    found: dict[str, tuple[dict[str, Any], tuple[Choice, ...]]] = {}
    # The order of product is that of nested loops: the last axis varies fastest.
    for chosen in itertools.product(*groups):
        # A grid that varies only its seeds has a single point, without labels.
        name = "-".join(label for label, _, _ in chosen) or "base"
        # Two entries of different axes can share a name, so that two combinations read alike.
        if name in found:
            raise ConfigError(
                f"{path}: two points of the grid are named {name}; rename a variant or a setting of an axis"
            )
        settings = {path: value for _, own, _ in chosen for path, value in own.items()}
        found[name] = settings, tuple(choice for _, _, choice in chosen)
    seeds = {name: list(file.seeds) for name in found}
    for extra in file.extra_seeds:
        for pattern in extra.points:
            matching = fnmatch.filter(found, pattern)
            if not matching:
                raise ConfigError(
                    f"{path}: extra_seeds names {show(pattern)}, which matches no point of the grid; its points are "
                    f"{', '.join(list(found)[:6])}{', ...' if len(found) > 6 else ''}"
                )
            for name in matching:
                seeds[name] += [seed for seed in extra.seeds if seed not in seeds[name]]
    return [GridPoint(name, settings, tuple(seeds[name]), choices) for name, (settings, choices) in found.items()]


def _choices(
    settings_by_name: Mapping[str, Settings], path: str | None = None
) -> list[tuple[str, dict[str, Any], Choice]]:
    """Return name, settings, and choice of each entry; the labels of an axis of values (``path``) show the values."""
    paths = tuple(dict.fromkeys(other for settings in settings_by_name.values() for other in settings or {}))
    every = [settings or {} for settings in settings_by_name.values()]
    found = []
    for name, settings in zip(settings_by_name, every, strict=True):
        words = setting_label(path, settings[path]) if path is not None else _own_label(settings, every)
        # Without an explicit name, the words are clearer than the name that was derived from them.
        is_made_of_words = path is not None or name == name_of(words)
        found.append((name, settings, Choice(words if is_made_of_words else name, paths)))
    return found


def _by_name(entries: list[Any]) -> dict[str, Settings]:
    """Return a list of variants by name; an entry without a name is named after the settings that distinguish it."""
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("each entry must be a mapping of settings by dotted path, with an optional name")
    every = [{path: value for path, value in entry.items() if path != "name"} for entry in entries]
    found: dict[str, Settings] = {}
    for entry, settings in zip(entries, every, strict=True):
        name = entry.get("name") or name_of(_own_label(settings, every)) or "base"
        if name in found:
            raise ValueError(f"two variants are named {name}; rename one of them")
        found[name] = settings
    return found


def _own_label(settings: Mapping[str, Any], every: list[dict[str, Any]]) -> str:
    """Return the settings in words, without the settings and overrides that every variant has."""
    words = []
    for path, value in settings.items():
        if len(every) > 1 and all(path in other and other[path] == value for other in every):
            continue
        # Overrides are lists of settings; JSON of them would make an unreadable name.
        if path == OVERRIDES and isinstance(value, list):
            lists = [other[path] for other in every if isinstance(other.get(path), list)]
            value = [one for one in value if len(lists) < len(every) or not all(one in other for other in lists)]
        words.append(setting_label(path, value))
    return "; ".join(words)


def _named(path: str, axis: list[Any] | Mapping[str, Settings]) -> Mapping[str, Settings]:
    """Return the settings of an axis by name; a value is named by the letter or last part of its path and itself."""
    if not isinstance(axis, list):
        return axis
    return {_value_name(path, value): {path: value} for value in axis}


def _value_name(path: str, value: Any) -> str:
    if path == OVERRIDES and isinstance(value, list):
        return name_of(setting_label(path, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{LETTERS[path]}{text}" if path in LETTERS else f"{path.rpartition('.')[2]}-{text}"


def _broken_rules(file: GridFile) -> Iterator[str]:
    if len(set(file.seeds)) < len(file.seeds):
        yield f"seeds ({show(file.seeds)}) contains a seed twice; keep each once"
    yield from _wrong_paths("settings", file.settings)
    yield from _wrong_settings("variants", file.variants or {})
    for name, axis in file.axes.items():
        yield from _wrong_axis(name, axis)
    yield from _set_twice(file)


def _wrong_axis(name: str, axis: list[Any] | dict[str, Settings]) -> Iterator[str]:
    if not axis:
        yield f"axes.{name} is empty; add values, or remove the axis"
    elif isinstance(axis, list):
        yield from _wrong_paths(f"axes.{name}", {name: None})
        for position, value in enumerate(axis):
            is_named = isinstance(value, str | int | float | None) or (name == OVERRIDES and isinstance(value, list))
            if not is_named or not re.match(_NAME, _value_name(name, value)):
                yield (
                    f"axes.{name} has the value {show(value)}, which cannot be part of the name of a run; "
                    f"write the axis as a mapping with a name for each value, such as first: {{{name}: {show(value)}}}"
                )
            # 1 and True, and 1 and 1.0, are equal in Python but different settings.
            if any(value == other and type(value) is type(other) for other in axis[:position]):
                yield f"axes.{name} has the value {show(value)} twice; keep it once"
    else:
        yield from _wrong_settings(f"axes.{name}", axis)


def _wrong_settings(section: str, settings_by_name: Mapping[str, Settings]) -> Iterator[str]:
    for name, settings in settings_by_name.items():
        yield from _wrong_paths(f"{section}.{name}", settings or {})


def _wrong_paths(section: str, settings: Mapping[str, Any]) -> Iterator[str]:
    for path, value in settings.items():
        parts = tuple(path.split("."))
        if len(walk(parts)[0]) < len(parts):
            yield f"{section}: {unknown_setting(parts).message}"
        elif path in GIVEN:
            yield f"{section} sets {path} ({show(value)}), which the grid sets for every run; remove it"


def _set_twice(file: GridFile) -> Iterator[str]:
    """Yield the paths that two axes, or an axis and the variants, both set: one would override the other."""
    groups = {"variants": [settings or {} for settings in (file.variants or {}).values()]}
    for name, axis in file.axes.items():
        groups[f"axes.{name}"] = (
            [{name: 0}] if isinstance(axis, list) else [settings or {} for settings in axis.values()]
        )
    paths = {section: {path for settings in group for path in settings} for section, group in groups.items()}
    for (one, ours), (other, theirs) in itertools.combinations(paths.items(), 2):
        for path in sorted(ours):
            # A parent path sets everything below it, so it conflicts with each of its children.
            if any(path == b or path.startswith(f"{b}.") or b.startswith(f"{path}.") for b in theirs):
                yield f"{one} and {other} both set {path}; remove one, or join them in one axis of named settings"
