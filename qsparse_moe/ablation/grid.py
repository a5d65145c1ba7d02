"""A grid file: a base config, named variants of it and seeds, as complete configs with stable ids. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qsparse_moe.config.load import load_config
from qsparse_moe.config.problems import Problem, dotted, raise_if_any, show
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.config.yaml_text import parse_yaml
from qsparse_moe.errors import ConfigError

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# What every run of a grid is given; a grid that sets them too would say two things.
_GIVEN = ("training.name", "training.output_dir", "training.seed", "training.resume")


class GridFile(BaseModel):
    """What a grid file may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    base: str
    """Config file that every run starts from, relative to the grid file."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """One run a variant and seed."""
    settings: dict[str, Any] = {}
    """Settings of every run by dotted path, over those of the base."""
    variants: Annotated[dict[Annotated[str, Field(pattern=_NAME)], dict[str, Any] | None], Field(min_length=1)]
    """By name, the settings in which a variant differs; the first is what the others are compared with."""


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    variant: str
    seed: int
    config: RunConfig

    @property
    def id(self) -> str:
        """Stable over changes of the grid's other entries."""
        return self.config.training.name


@dataclass(frozen=True)
class Grid:
    """All runs of a grid file, variant by variant."""

    name: str
    runs: tuple[GridRun, ...]

    @property
    def folder(self) -> Path:
        """Where the runs and the results lie."""
        return Path(self.runs[0].config.training.output_dir)

    @property
    def variants(self) -> tuple[str, ...]:
        """In the order of the file."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))


def load_grid(path: Path, overrides: Sequence[str] = (), *, output_dir: str = "runs/ablations") -> Grid:
    """The grid that ``path`` describes; every config of it is checked.

    Args:
        path: a grid file.
        overrides: settings of every run, over all others, as ``training.steps=50``.
        output_dir: the runs lie in a folder of the grid's name below it.

    Raises:
        ConfigError: the file cannot be read or a run's config breaks a rule; the message names the variant.
    """
    file = _read(path)
    _refuse_given(path, file)
    base = path.parent / file.base
    runs = []
    for variant, settings in file.variants.items():
        changed = [_override(name, value) for name, value in (file.settings | (settings or {})).items()]
        for seed in file.seeds:
            given = (f"{variant}-seed{seed}", f"{output_dir}/{path.stem}", str(seed), "true")
            fixed = [f"{name}={value}" for name, value in zip(_GIVEN, given, strict=True)]
            try:
                config = load_config(base, [*changed, *overrides, *fixed])
            except ConfigError as error:
                raise ConfigError(f"{path}, variant {variant}: {error}") from None
            runs.append(GridRun(variant, seed, config))
    return Grid(path.stem, tuple(runs))


def _read(path: Path) -> GridFile:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); name a grid file such as configs/ablations/paper.yaml"
        ) from None
    value, problems = parse_yaml(text, str(path))
    raise_if_any(problems, str(path))
    try:
        return GridFile.model_validate(value)
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


def _refuse_given(path: Path, file: GridFile) -> None:
    for place, settings in [("settings", file.settings), *((f"variants.{n}", s) for n, s in file.variants.items())]:
        for name in _GIVEN:
            if settings and name in settings:
                raise ConfigError(
                    f"{path}: {place} sets {name} ({show(settings[name])}), which every run of a grid is given; "
                    "remove it"
                )


def _override(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value)}"  # JSON is YAML on one line
