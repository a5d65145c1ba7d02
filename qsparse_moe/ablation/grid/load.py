"""A grid file as complete configs with stable ids. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qsparse_moe.ablation.grid.file import GIVEN, Choice, GridPoint, grid_points, read_grid_file
from qsparse_moe.config.fields import all_settings
from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import ModelConfig, RunConfig, Site
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan

_ITEM = re.compile(r"\.\d+(\..*)?$")


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    variant: str
    """The point of the grid: the variant's name and that of each axis' setting."""
    seed: int
    config: RunConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the variant and the axes set, by dotted path."""
    choices: tuple[Choice, ...] = ()
    """The names of its variant and of its setting of every axis."""

    @property
    def id(self) -> str:
        """Stable over changes of the grid's other entries."""
        return self.config.training.name


@dataclass(frozen=True)
class Grid:
    """All runs of a grid file, point by point."""

    name: str
    runs: tuple[GridRun, ...]

    @property
    def folder(self) -> Path:
        """Where the runs and the results lie."""
        return Path(self.runs[0].config.training.output_dir)

    @property
    def variants(self) -> tuple[str, ...]:
        """The points, in the order of the file."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))

    @cached_property
    def varied_sites(self) -> tuple[tuple[int, Site], ...]:
        """The layers and sites at which not every run has the same S; none where the models have different places."""
        plans = [SparsityPlan.from_config(model).values for model in self._models]
        shapes = [{place: len(values) for place, values in plan.items()} for plan in plans]
        if any(shape != shapes[0] for shape in shapes):
            return ()
        return tuple(place for place in plans[0] if len({plan[place] for plan in plans}) > 1)

    @property
    def _models(self) -> list[ModelConfig]:
        return list({run.variant: run.config.model for run in self.runs}.values())


def load_grid(path: Path, overrides: Sequence[str] = (), *, output_dir: str = "runs/ablations") -> Grid:
    """The grid that ``path`` describes; every config of it is checked, and nothing is written.

    Args:
        path: a grid file.
        overrides: settings of every run, over all others, as ``training.steps=50``.
        output_dir: the runs lie in a folder of the grid's name below it.

    Raises:
        ConfigError: the file cannot be read or a run's config breaks a rule, the message names the point; or two points
            have one name or are the same run.
    """
    file = read_grid_file(path)
    points = grid_points(path, file)
    common = [_override(name, value) for name, value in file.settings.items()]
    known = {name for name, _ in all_settings()}
    # An item of a list has no column: its whole list has.
    paths = {_ITEM.sub("", name) for point in points for name in point.settings}
    varied = sorted(paths & known)
    runs = []
    for point in points:
        changed = [*common, *(_override(name, value) for name, value in point.settings.items()), *overrides]
        for seed in point.seeds:
            given = (f"{point.name}-seed{seed}", f"{output_dir}/{path.stem}", str(seed), "true")
            fixed = [f"{name}={value}" for name, value in zip(GIVEN, given, strict=True)]
            config = _with_columns(
                _checked(path, point, path.parent / file.base, [*changed, *fixed]), point.name, varied
            )
            runs.append(GridRun(point.name, seed, config, point.settings, point.choices))
    _refuse_twins(path, runs)
    return Grid(path.stem, tuple(runs))


def _checked(path: Path, point: GridPoint, base: Path, overrides: Sequence[str]) -> RunConfig:
    try:
        return load_config(base, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}, variant {point.name}: {error}") from None


def _with_columns(config: RunConfig, variant: str, varied: Sequence[str]) -> RunConfig:
    """Every run of the grid has columns on the HPARAMS page for its variant and for what any of them varies."""
    metrics = config.metrics
    if not metrics.tensorboard:
        return config
    columns = tuple(dict.fromkeys((*metrics.hyperparameters, *varied)))
    return config.model_copy(
        update={"metrics": metrics.model_copy(update={"hyperparameters": columns, "variant": variant})}
    )


def _refuse_twins(path: Path, runs: Iterable[GridRun]) -> None:
    """Two runs that differ in their name only would be one, trained twice."""
    names: dict[str, str] = {}
    for run in runs:
        training = run.config.training.model_copy(update={"name": ""})
        settings = run.config.model_copy(update={"training": training}).model_dump_json()
        if settings in names:
            raise ConfigError(
                f"{path}: {names[settings]} and {run.id} are the same run, setting for setting; remove one of them, or "
                "let them differ"
            )
        names[settings] = run.id


def _override(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value)}"  # JSON is YAML on one line
