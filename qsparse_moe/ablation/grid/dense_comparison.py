"""The comparison of each finished run of a grid with itself at S = 0: its command, its file, and its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qsparse_moe.ablation.grid.load import Grid, GridRun
from qsparse_moe.runs.folder import newest_step, run_folder

FIGURES = ("choices_changed", "first_choice_changed", "kl_divergence", "top1_agreement")
"""Figures of the comparison that the results of a grid contain, by their names in its file."""


def is_compared(grid: Grid, run: GridRun) -> bool:
    """Return whether the grid asks for the comparison of this run, and its model has one."""
    # ReLU selects the positive features whatever S is, so there is no S = 0.
    return grid.compare_dense is not None and run.config.model.sparsity.selection != "relu"


def comparison_command(grid: Grid, run: GridRun) -> list[str]:
    """Return the command that compares a finished run and writes ``comparison_file``."""
    folder = run_folder(run.config)
    settings = {"compare": "dense", "rows": grid.compare_dense, "prompts": 0, "output": _folder(grid, run)}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "qsparse_moe", "evaluate", str(folder), *options]


def dense_figures(grid: Grid, run: GridRun) -> dict[str, float | None] | None:
    """Return the figures of the comparison after the run's newest checkpoint; None before there are any."""
    if not is_compared(grid, run):
        return None
    try:
        content = json.loads((_folder(grid, run) / "comparison-run-against-dense.json").read_text("utf-8"))
    except (OSError, ValueError):
        # Not made yet, or half written by a process that was killed: it is made again.
        return None
    if content.get("step") != newest_step(run_folder(run.config)):
        return None
    return {name: content.get(name) for name in FIGURES}


def _folder(grid: Grid, run: GridRun) -> Path:
    # Named after the number of sequences, so that another number in the grid file makes another comparison.
    return run_folder(run.config) / "evaluation" / f"rows-{grid.compare_dense}"
