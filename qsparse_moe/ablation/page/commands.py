"""Commands that continue from a trained model, as the pages of its reports propose them."""

from __future__ import annotations

from pathlib import Path

from qsparse_moe.runs.folder import CHECKPOINTS, CONFIG_FILE

PROGRAM = "qsparse-moe"


def run_of(model: Path) -> Path:
    """Return the run of one of its checkpoints; a run or an export is its own."""
    return model.parent.parent if model.parent.name == CHECKPOINTS else model


def config_of(model: Path) -> Path:
    """Return the configuration of a run, a checkpoint, or an export."""
    return run_of(model) / CONFIG_FILE
