"""What a grid file may hold, and its points: every variant with every setting of every axis. Imports no torch."""

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
"""What every run of a grid is given; a grid that sets them too would say two things."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Name = Annotated[str, Field(pattern=_NAME)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Settings = dict[str, Any] | None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ExtraSeeds(_Strict):
    """Seeds beyond ``seeds``, for some points of the grid."""

    seeds: Seeds
    """The seeds."""
    points: Annotated[list[str], Field(min_length=1)]
    """Names of points, which are those of runs without their seed; ``*`` stands for any text."""


class GridFile(_Strict):
    """What a grid file may hold: a run for every variant, setting of every axis, and seed."""

    base: str
    """Config file that every run starts from, relative to the grid file."""
    seeds: Seeds
    """One run a point and seed."""
    settings: dict[str, Any] = {}
    """Settings of every run by dotted path, over those of the base."""
    variants: Annotated[dict[Name, Settings], Field(min_length=1)] | None = None
    """By name, the settings in which a variant differs; the first is what the others are compared with. Or a list of
    settings, each with a ``name`` or named after what it sets."""
    axes: dict[str, list[Any] | dict[Name, Settings]] = {}
    """By dotted path a list of values; or, under any name, a mapping of settings that change together, each named."""
    extra_seeds: list[ExtraSeeds] = []
    """More seeds for a part of the grid."""

    @field_validator("variants", mode="before")
    @classmethod
    def _named_variants(cls, value: Any) -> Any:
        return _by_name(value) if isinstance(value, list) else value


class Choice(NamedTuple):
    """What a point takes of the variants, or of one axis."""

    label: str
    """For legends: the name that the file gives it, or else what it sets in words."""
    paths: tuple[str, ...]
    """Every setting that any choice of that axis sets."""


@dataclass(frozen=True)
class GridPoint:
    """One combination of a variant and a setting of every axis."""

    name: str
    """That of its runs, without their seed."""
    settings: dict[str, Any]
    """What the variant and the axes set, by dotted path."""
    seeds: tuple[int, ...]
    choices: tuple[Choice, ...] = ()
    """Of the variant and of every axis, in their order."""


def read_grid_file(path: Path) -> GridFile:
    """The content of ``path``, with every problem that shows without its base config.

    Raises:
        ConfigError: it cannot be read, an axis is empty or sets what is no setting, or two of its parts set the same.
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
        raise
    raise_if_any([Problem(f"{path}: {message}") for message in _broken_rules(file)], str(path))
    return file


def grid_points(path: Path, file: GridFile) -> list[GridPoint]:
    """The points of ``file`` in its order, the last axis first to change.

    Raises:
        ConfigError: two points have one name, or extra seeds are for no point.
    """
    groups = [_choices(file.variants)] if file.variants else []
    groups += [
        _choices(_named(name, axis), None if isinstance(axis, dict) else name) for name, axis in file.axes.items()
    ]
    found: dict[str, tuple[dict[str, Any], tuple[Choice, ...]]] = {}
    for chosen in itertools.product(*groups):
        name = "-".join(label for label, _, _ in chosen) or "base"
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
                    f"{path}: extra_seeds name {show(pattern)}, which is no point of the grid; its points are "
                    f"{', '.join(list(found)[:6])}{', ...' if len(found) > 6 else ''}"
                )
            for name in matching:
                seeds[name] += [seed for seed in extra.seeds if seed not in seeds[name]]
    return [GridPoint(name, settings, tuple(seeds[name]), choices) for name, (settings, choices) in found.items()]


def _choices(
    settings_by_name: Mapping[str, Settings], path: str | None = None
) -> list[tuple[str, dict[str, Any], Choice]]:
    """Name, settings and choice of each; an axis of values (``path``) has labels made of them."""
    paths = tuple(dict.fromkeys(other for settings in settings_by_name.values() for other in settings or {}))
    every = [settings or {} for settings in settings_by_name.values()]
    found = []
    for name, settings in zip(settings_by_name, every, strict=True):
        words = setting_label(path, settings[path]) if path is not None else _own_label(settings, every)
        is_made_of_words = path is not None or name == name_of(words)
        found.append((name, settings, Choice(words if is_made_of_words else name, paths)))
    return found


def _by_name(entries: list[Any]) -> dict[str, Settings]:
    """A list of variants by their names; one without a name is named after the settings that not all of them have."""
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("each entry must be settings by dotted path, with or without a name beside them")
    every = [{path: value for path, value in entry.items() if path != "name"} for entry in entries]
    found: dict[str, Settings] = {}
    for entry, settings in zip(entries, every, strict=True):
        name = entry.get("name") or name_of(_own_label(settings, every)) or "base"
        if name in found:
            raise ValueError(f"two of them are named {name}; give one another name")
        found[name] = settings
    return found


def _own_label(settings: Mapping[str, Any], every: list[dict[str, Any]]) -> str:
    """The settings in words, without those, or those overrides, that every variant has."""
    words = []
    for path, value in settings.items():
        if len(every) > 1 and all(path in other and other[path] == value for other in every):
            continue
        if path == OVERRIDES and isinstance(value, list):
            lists = [other[path] for other in every if isinstance(other.get(path), list)]
            value = [one for one in value if len(lists) < len(every) or not all(one in other for other in lists)]
        words.append(setting_label(path, value))
    return "; ".join(words)


def _named(path: str, axis: list[Any] | Mapping[str, Settings]) -> Mapping[str, Settings]:
    """The settings of an axis by name; a path with values has its letter, or its last part, and the value."""
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
        yield f"seeds ({show(file.seeds)}) hold one twice; keep each once"
    yield from _wrong_paths("settings", file.settings)
    yield from _wrong_settings("variants", file.variants or {})
    for name, axis in file.axes.items():
        yield from _wrong_axis(name, axis)
    yield from _set_twice(file)


def _wrong_axis(name: str, axis: list[Any] | dict[str, Settings]) -> Iterator[str]:
    if not axis:
        yield f"axes.{name} is empty; give it values, or remove the axis"
    elif isinstance(axis, list):
        yield from _wrong_paths(f"axes.{name}", {name: None})
        for position, value in enumerate(axis):
            is_named = isinstance(value, str | int | float | None) or (name == OVERRIDES and isinstance(value, list))
            if not is_named or not re.match(_NAME, _value_name(name, value)):
                yield (
                    f"axes.{name} has the value {show(value)}, which cannot stand in the name of a run; "
                    f"write the axis as a mapping with a name for each value, such as first: {{{name}: {show(value)}}}"
                )
            if any(value == other and type(value) is type(other) for other in axis[:position]):
                yield f"axes.{name} has the value {show(value)} twice; keep it once"
    else:
        yield from _wrong_settings(f"axes.{name}", axis)


def _wrong_settings(place: str, settings_by_name: Mapping[str, Settings]) -> Iterator[str]:
    for name, settings in settings_by_name.items():
        yield from _wrong_paths(f"{place}.{name}", settings or {})


def _wrong_paths(place: str, settings: Mapping[str, Any]) -> Iterator[str]:
    for path, value in settings.items():
        parts = tuple(path.split("."))
        if len(walk(parts)[0]) < len(parts):
            yield f"{place}: {unknown_setting(parts).message}"
        elif path in GIVEN:
            yield f"{place} sets {path} ({show(value)}), which every run of a grid is given; remove it"


def _set_twice(file: GridFile) -> Iterator[str]:
    """What two axes, or an axis and a variant, both set: the one would hide the other."""
    groups = {"variants": [settings or {} for settings in (file.variants or {}).values()]}
    for name, axis in file.axes.items():
        groups[f"axes.{name}"] = (
            [{name: 0}] if isinstance(axis, list) else [settings or {} for settings in axis.values()]
        )
    paths = {place: {path for settings in group for path in settings} for place, group in groups.items()}
    for (one, ours), (other, theirs) in itertools.combinations(paths.items(), 2):
        for path in sorted(ours):
            if any(path == b or path.startswith(f"{b}.") or b.startswith(f"{path}.") for b in theirs):
                yield f"{one} and {other} both set {path}; let one do it, or join them in one axis of named settings"
