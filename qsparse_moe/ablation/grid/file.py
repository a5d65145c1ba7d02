"""The schema of a grid file and its points: every variant with every setting of every axis. Imports no torch."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from qsparse_moe.ablation.grid.claims import (
    STEPS,
    BestOver,
    Comparison,
    broken_best_over,
    broken_claims,
    broken_gaps,
    broken_lengths,
)
from qsparse_moe.ablation.grid.entries import NAME_PATTERN, Choice, Name, Settings, by_name, choices, named, value_name
from qsparse_moe.ablation.grid.strict import Seeds, Strict
from qsparse_moe.config.fields import unknown_setting, walk
from qsparse_moe.config.labels import OVERRIDES
from qsparse_moe.config.problems import Problem, dotted, raise_if_any, show
from qsparse_moe.config.yaml_text import parse_yaml
from qsparse_moe.errors import ConfigError

GIVEN = ("training.name", "training.output_dir", "training.seed", "training.resume")
"""Settings that the grid itself gives to every run, so that a grid file must not set them."""


class ExtraSeeds(Strict):
    """Seeds in addition to ``seeds``, for some points of the grid."""

    seeds: Seeds
    """The additional seeds."""
    points: Annotated[list[str], Field(min_length=1)]
    """Names of points, which are the names of runs without the seed; ``*`` matches any text."""


class GridFile(Strict):
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
    exclude: list[str] = []
    """Names of points that are left out, such as rates too high for one size; ``*`` matches any text."""
    extra_seeds: list[ExtraSeeds] = []
    """Additional seeds for a part of the grid."""
    compare_dense: Annotated[int, Field(ge=1)] | None = None
    """Number of validation sequences on which every finished run is compared with itself at S = 0; None: no run is."""
    comparisons: list[Comparison] = []
    """Claims about the variants, each of which the report decides or leaves open."""
    best_over: BestOver | None = None
    """The axis over which the comparisons take every variant at its best; None: there is none."""
    continue_over_steps: bool = False
    """Train runs that differ only in ``training.steps`` as one run, on from each length to the next."""

    @field_validator("variants", mode="before")
    @classmethod
    def _named_variants(cls, value: Any) -> Any:
        return by_name(value) if isinstance(value, list) else value


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
    entry: str | None = None
    """Name of the variant in the file, or None if the file has no variants."""
    place: Mapping[str, Any] = field(default_factory=dict)
    """The value, or the name of the setting, by axis."""
    run_name: str = ""
    """``name``, without the length if runs are trained on from one length to the next."""


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
        ConfigError: two points have the same name, no point matches a name of ``exclude`` or of the extra seeds, or
            none is left.
    """
    found: dict[str, GridPoint] = {}
    # The order of product is that of nested loops: the last axis varies fastest.
    for chosen in itertools.product(*_groups(file)):
        point = _point(file, chosen)
        # Two entries of different axes can share a name, so that two combinations read alike.
        if point.name in found:
            raise ConfigError(
                f"{path}: two points of the grid are named {point.name}; rename a variant or a setting of an axis"
            )
        found[point.name] = point
    excluded = {name for pattern in file.exclude for name in _matching(path, "exclude", pattern, found)}
    if len(excluded) == len(found):
        raise ConfigError(
            f"{path}: exclude ({show(file.exclude)}) leaves no point of the grid; remove some of its names"
        )
    found = {name: point for name, point in found.items() if name not in excluded}
    seeds = {name: list(file.seeds) for name in found}
    for extra in file.extra_seeds:
        for pattern in extra.points:
            for name in _matching(path, "extra_seeds", pattern, found):
                seeds[name] += [seed for seed in extra.seeds if seed not in seeds[name]]
    return [replace(point, seeds=tuple(seeds[name])) for name, point in found.items()]


def _matching(path: Path, section: str, pattern: str, names: Collection[str]) -> list[str]:
    """Return those of ``names`` that ``pattern``, which ``section`` of the file lists, matches.

    Raises:
        ConfigError: there is none, so that the pattern would do nothing.
    """
    matching = fnmatch.filter(names, pattern)
    if not matching:
        raise ConfigError(
            f"{path}: {section} names {show(pattern)}, which matches no point of the grid; its points are "
            f"{', '.join(list(names)[:6])}{', ...' if len(names) > 6 else ''}"
        )
    return matching


_Entry = tuple[str, dict[str, Any], Choice]


def _groups(file: GridFile) -> list[list[_Entry]]:
    """Return the entries of the variants, if there are any, and then of each axis."""
    groups = [choices(file.variants)] if file.variants else []
    return groups + [
        choices(named(name, axis), None if isinstance(axis, dict) else name) for name, axis in file.axes.items()
    ]


def _point(file: GridFile, chosen: Sequence[_Entry]) -> GridPoint:
    """Return the point that combines these entries, without its seeds."""
    settings = {path: value for _, own, _ in chosen for path, value in own.items()}
    of_axes = chosen[1:] if file.variants else chosen
    is_length = [file.continue_over_steps and name == STEPS for name in file.axes]
    labels = [label for label, _, _ in chosen]
    kept = labels[: len(chosen) - len(of_axes)]
    kept += [label for (label, _, _), left_out in zip(of_axes, is_length, strict=True) if not left_out]
    place = {
        name: label if isinstance(axis, dict) else own[name]
        for (name, axis), (label, own, _) in zip(file.axes.items(), of_axes, strict=True)
    }
    return GridPoint(
        # A grid that varies only its seeds has a single point, without labels.
        name="-".join(labels) or "base",
        settings=settings,
        seeds=(),
        choices=tuple(choice for _, _, choice in chosen),
        entry=labels[0] if file.variants else None,
        place=place,
        run_name="-".join(kept) or "base",
    )


def _broken_rules(file: GridFile) -> Iterator[str]:
    if len(set(file.seeds)) < len(file.seeds):
        yield f"seeds ({show(file.seeds)}) contains a seed twice; keep each once"
    yield from _wrong_paths("settings", file.settings)
    yield from _wrong_settings("variants", file.variants or {})
    for name, axis in file.axes.items():
        yield from _wrong_axis(name, axis)
    yield from _set_twice(file)
    yield from broken_claims(file.comparisons, file.variants)
    yield from broken_gaps(file.comparisons, file.axes, file.best_over)
    yield from broken_best_over(file.best_over, file.axes, file.seeds)
    yield from broken_lengths(file.continue_over_steps, file.axes, file.compare_dense)


def _wrong_axis(name: str, axis: list[Any] | dict[str, Settings]) -> Iterator[str]:
    if not axis:
        yield f"axes.{name} is empty; add values, or remove the axis"
    elif isinstance(axis, list):
        yield from _wrong_paths(f"axes.{name}", {name: None})
        for position, value in enumerate(axis):
            is_named = isinstance(value, str | int | float | None) or (name == OVERRIDES and isinstance(value, list))
            if not is_named or not re.match(NAME_PATTERN, value_name(name, value)):
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
