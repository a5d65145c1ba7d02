"""Load a grid file as complete configs with stable ids. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_moe.ablation.grid.claims import Comparison
from qsparse_moe.ablation.grid.entries import Choice
from qsparse_moe.ablation.grid.file import GIVEN, GridPoint, grid_points, read_grid_file
from qsparse_moe.config.fields import all_settings
from qsparse_moe.config.load import load_config
from qsparse_moe.config.overrides import override_of
from qsparse_moe.config.schema import ModelConfig, RunConfig, Site
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan

if TYPE_CHECKING:
    from qsparse_moe.ablation.grid.results import RunResult

# Matches the index of a list item and whatever follows it in a dotted path.
_ITEM = re.compile(r"\.\d+(\..*)?$")


@dataclass(frozen=True)
class GridRun:
    """One run of a grid."""

    variant: str
    """Name of the grid point: the name of the variant and of the setting of each axis."""
    seed: int
    config: RunConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the variant and the axes, by dotted path."""
    choices: tuple[Choice, ...] = ()
    """The choice of the variant and of each axis."""
    entry: str | None = None
    """Name of the variant in the grid file, or None if the file has no variants."""
    place: Mapping[str, Any] = field(default_factory=dict)
    """The value, or the name of the setting, by axis."""
    only_best: bool = False
    """True if the run is needed only at the best value of its variant on the axis of ``best_over``."""

    @property
    def id(self) -> str:
        """Name of the run, which does not change when other entries of the grid do."""
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """All runs of a grid file, in the order of its points."""

    name: str
    runs: tuple[GridRun, ...]
    compare_dense: int | None = None
    """Number of validation sequences on which every finished run is compared with itself at S = 0."""
    comparisons: tuple[Comparison, ...] = ()
    """Claims about the variants."""
    best_over: str | None = None
    """The axis over which the comparisons take every variant at its best."""
    continued: bool = False
    """True if runs that differ only in ``training.steps`` share a folder and are trained on from one to the next."""
    earlier: Mapping[str, RunResult] = field(default_factory=dict)
    """Results of finished runs by id, from an earlier report; these runs are not trained, and need no folder."""

    @property
    def folder(self) -> Path:
        """The folder of the runs and the results."""
        return Path(self.runs[0].config.training.output_dir)

    def cell(self, run: GridRun) -> str:
        """Return the key of the cell of ``run``: its place on every axis but that of ``best_over``, as JSON."""
        return json.dumps({axis: value for axis, value in run.place.items() if axis != self.best_over})

    @property
    def num_needed(self) -> int:
        """Number of runs that are trained in the end: a search needs the further seeds at one value per variant."""
        kept = {(run.entry, self.cell(run), run.seed) for run in self.runs if run.only_best}
        return len(kept) + sum(not run.only_best for run in self.runs)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the points, in the order of the file."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))

    @cached_property
    def varied_sites(self) -> tuple[tuple[int, Site], ...]:
        """Layers and sites at which the runs differ in S; empty if the models differ in layers, sites, or experts."""
        plans = [SparsityPlan.from_config(model).values for model in self._models]
        shapes = [{key: len(values) for key, values in plan.items()} for plan in plans]
        # Cells of models with different shapes cannot be matched.
        if any(shape != shapes[0] for shape in shapes):
            return ()
        return tuple(key for key in plans[0] if len({plan[key] for plan in plans}) > 1)

    @property
    def _models(self) -> list[ModelConfig]:
        return list({run.variant: run.config.model for run in self.runs}.values())


def load_grid(path: Path, overrides: Sequence[str] = (), *, output_dir: str = "runs/ablations") -> Grid:
    """Load the grid file ``path`` and check every config. Nothing is written.

    Args:
        path: the grid file.
        overrides: settings of every run such as ``training.steps=50``, which take precedence over the grid.
        output_dir: the parent of the folder of the grid.

    Raises:
        ConfigError: the file cannot be read, a config breaks a rule, or two points have the same name or settings.
    """
    file = read_grid_file(path)
    points = grid_points(path, file)
    _refuse_given(path, overrides)
    common = [override_of(name, value) for name, value in file.settings.items()]
    known = {name for name, _ in all_settings()}
    # HPARAMS has no column for an item of a list, only for the whole list.
    paths = {_ITEM.sub("", name) for point in points for name in point.settings}
    varied = sorted(paths & known)
    runs = []
    extra = file.best_over.seeds if file.best_over else []
    for point in points:
        # Later entries take precedence: the command line over the point, and the point over the grid.
        changed = [*common, *(override_of(name, value) for name, value in point.settings.items()), *overrides]
        for seed in (*point.seeds, *(seed for seed in extra if seed not in point.seeds)):
            # resume=true makes the same command continue interrupted runs.
            given = (f"{point.run_name}-seed{seed}", f"{output_dir}/{path.stem}", seed, True)
            # These come last of all, because two runs with one name would share a folder.
            fixed = [override_of(name, value) for name, value in zip(GIVEN, given, strict=True)]
            config = _with_columns(
                _checked(path, point, path.parent / file.base, [*changed, *fixed]), point.name, varied
            )
            runs.append(_run(point, seed, config, only_best=seed not in point.seeds))
    _refuse_twins(path, runs)
    if file.continue_over_steps:
        _refuse_decay(path, runs)
    axis = file.best_over.axis if file.best_over else None
    grid = Grid(path.stem, tuple(runs), file.compare_dense, tuple(file.comparisons), axis, file.continue_over_steps)
    return grid if axis is None and not grid.continued else replace(grid, runs=tuple(_by_cell(grid)))


def _run(point: GridPoint, seed: int, config: RunConfig, *, only_best: bool) -> GridRun:
    return GridRun(
        point.name, seed, config, point.settings, point.choices, point.entry, point.place, only_best=only_best
    )


def _by_cell(grid: Grid) -> list[GridRun]:
    """Return the runs of one cell after those of another; within a cell, each variant ends before the next begins."""
    # The first variant passes through the cells in the order of the axes. A grid is often stopped in the middle, and
    # a few variants with all their seeds decide more than all variants with two.
    cells = {cell: position for position, cell in enumerate(dict.fromkeys(grid.cell(run) for run in grid.runs))}
    entries = {entry: position for position, entry in enumerate(dict.fromkeys(run.entry for run in grid.runs))}
    return sorted(grid.runs, key=lambda run: (cells[grid.cell(run)], entries[run.entry], run.only_best))


def _refuse_decay(path: Path, runs: Iterable[GridRun]) -> None:
    """Raise ConfigError if the end of a short run is another thing than the same step of a longer one."""
    for run in runs:
        schedule = run.config.training.learning_rate_schedule
        if schedule != "constant":
            raise ConfigError(
                f"{path}: continue_over_steps (true) needs training.learning_rate_schedule=constant, because other "
                f"schedules depend on training.steps, and {run.id} has {schedule}; set it in settings, or remove "
                "continue_over_steps"
            )


def _refuse_given(path: Path, overrides: Sequence[str]) -> None:
    for override in overrides:
        name, _, value = override.partition("=")
        if name.strip() in GIVEN:
            raise ConfigError(
                f"{name.strip()} ({value}) is set by the grid for every run of {path}, so that no two share a folder; "
                f"remove it. --output-dir names the parent folder, and seeds: in the grid file the seeds"
            )


def _checked(path: Path, point: GridPoint, base: Path, overrides: Sequence[str]) -> RunConfig:
    try:
        return load_config(base, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}, variant {point.name}: {error}") from None


def _with_columns(config: RunConfig, variant: str, varied: Sequence[str]) -> RunConfig:
    """Return the config with HPARAMS columns for the variant and for every setting that the grid varies."""
    metrics = config.metrics
    # HPARAMS is a page of TensorBoard.
    if not metrics.tensorboard:
        return config
    columns = tuple(dict.fromkeys((*metrics.hyperparameters, *varied)))
    return config.model_copy(
        update={"metrics": metrics.model_copy(update={"hyperparameters": columns, "variant": variant})}
    )


def _refuse_twins(path: Path, runs: Iterable[GridRun]) -> None:
    """Raise ConfigError if two runs differ only in their name: the same run would be trained twice."""
    names: dict[str, str] = {}
    for run in runs:
        training = run.config.training.model_copy(update={"name": ""})
        settings = run.config.model_copy(update={"training": training}).model_dump_json()
        if settings in names:
            raise ConfigError(
                f"{path}: {names[settings]} and {run.id} have the same settings; remove one of them, or change a "
                "setting"
            )
        names[settings] = run.id
