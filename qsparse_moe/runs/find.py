"""Folders that a user names: a run, one of its checkpoints, an export, a Hugging Face model.

They are checked before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.folder import CHECKPOINTS, CONFIG_FILE, UNFINISHED, checkpoint_step, newest_step

# The name is repeated here, because the package of checkpoints imports torch.
_CHECKPOINT_INDEX = "state.json"
_OTHER_PROGRAMS_CONFIG = "config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a trained model."""

    path: Path
    kind: Literal["run", "checkpoint", "export", "hugging_face", "hub"]
    """``hub``: the name of a model on the Hugging Face hub instead of a folder."""

    @property
    def config_folder(self) -> Path:
        """The folder whose config.yaml describes the model: that of the run where this is a checkpoint."""
        return self.path.absolute().parent.parent if self.kind == "checkpoint" else self.path

    @property
    def step(self) -> int | None:
        """Number of trained steps of the checkpoint, or of the newest one of a run.

        None for a run without a checkpoint, and for the other kinds, whose names do not contain the number.
        """
        if self.kind == "run":
            return newest_step(self.path)
        return checkpoint_step(self.path) if self.kind == "checkpoint" else None


def find_model(path: Path) -> ModelFolder:
    """Return what kind of model folder ``path`` is: a run, one of its checkpoints, or an export.

    Raises:
        CheckpointError: it is none of them, with the run folders that are beside it, or a checkpoint that is not
            complete.
    """
    if path.absolute().parent.name == CHECKPOINTS:
        _check_complete(path.absolute())
    if (path / _CHECKPOINT_INDEX).is_file() and path.absolute().parent.name == CHECKPOINTS:
        folder = ModelFolder(path, "checkpoint")
        find_run(folder.config_folder)
        return folder
    find_run(path)
    return ModelFolder(path, "export" if any(path.glob("model*.safetensors")) else "run")


def _check_complete(checkpoint: Path) -> None:
    is_beside = not checkpoint.exists() and any(checkpoint.parent.glob(f"{UNFINISHED[0]}{checkpoint.name}-*"))
    if is_beside or checkpoint.name.startswith(UNFINISHED):
        run = checkpoint.parent.parent
        raise CheckpointError(
            f"{checkpoint}: is not complete: its run is still writing it, or was killed while it did; only complete "
            f"checkpoints are read. Wait until its name is step-..., or name the run ({run}), whose newest complete "
            "checkpoint is used"
        )


def find_initial_weights(init_from: str) -> ModelFolder:
    """Return what kind of model folder ``training.init_from`` names. Needs no torch.

    Raises:
        CheckpointError: it is none that can be read; the message names the setting.
    """
    path = Path(init_from).expanduser()
    with naming_init_from(init_from):
        if (path / _OTHER_PROGRAMS_CONFIG).is_file() and not (path / CONFIG_FILE).is_file():
            return ModelFolder(path, "hugging_face")
        return ModelFolder(path, "hub") if is_hub_name(init_from) else find_model(path)


def is_hub_name(name: str) -> bool:
    """Return whether ``name`` has the form of a name on the Hugging Face hub and is rather not a mistyped folder."""
    path = Path(name).expanduser()
    if path.exists() or path.parent.exists() or not _HUB_NAME.fullmatch(name):
        return False
    folders = [entry.name for entry in Path.cwd().iterdir() if entry.is_dir()]
    return not difflib.get_close_matches(path.parent.name, folders, n=1, cutoff=0.7)


@contextlib.contextmanager
def naming_init_from(init_from: str) -> Iterator[None]:
    """Name ``training.init_from`` and its value in every CheckpointError raised inside."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"training.init_from ({init_from}): {error}") from error


def find_run(path: Path) -> Path:
    """Return ``path``, which is a run folder.

    Raises:
        CheckpointError: it is none; with the run folders that are beside it.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    problem = "does not exist" if not path.exists() else f"is not a run folder: it contains no {CONFIG_FILE}"
    if path.is_file():
        problem = "is a file, not a run folder"
    elif (path / _OTHER_PROGRAMS_CONFIG).is_file():
        raise CheckpointError(
            f"{path} contains {_OTHER_PROGRAMS_CONFIG} and no {CONFIG_FILE}, so it is the model of another program, "
            f"which must be imported first: qsparse-moe import {path} --output FOLDER"
        )
    # A mistyped run has its neighbours beside it, and a folder of runs has them inside.
    found = _runs_in(path.parent) or _runs_in(path)
    # A cutoff of 0 names the nearest runs however different they are, because any hint is better than none here.
    names = difflib.get_close_matches(path.name, [run.name for run in found], n=3, cutoff=0) if found else []
    nearest = ", such as " + ", ".join(str(found[0].parent / name) for name in names) if names else ""
    raise CheckpointError(f"{path} {problem}; name a folder made by qsparse-moe train{nearest}")


def _runs_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if (entry / CONFIG_FILE).is_file())
    except OSError:
        # These names are only a hint in an error message, so an unreadable folder is no second error.
        return []
