"""Where ``qsparse-moe evaluate`` writes the results of tasks and of comparisons. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.find import ModelFolder

FOLDER = "evaluation"


@dataclass(frozen=True)
class EvaluationFiles:
    """The files of one evaluation of the model in a folder."""

    json: Path
    tensorboard: Path | None
    """The folder within the run's TensorBoard folder; None for an export, which has none."""

    @classmethod
    def of(cls, found: ModelFolder, name: str, output: Path | None) -> EvaluationFiles:
        """Return the files of the evaluation ``name``, before anything is computed.

        Args:
            found: the folder of the model.
            name: its first part, up to a slash, is the kind of the evaluation.
            output: folder for the JSON file; None is ``evaluation`` in the folder of the run or export.

        Raises:
            ConfigError: the folder of the JSON file cannot be written.
        """
        folder = found.config_folder / FOLDER if output is None else output
        # Without creating it: an evaluation that is refused later leaves nothing behind.
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        problem = "not a folder" if not existing.is_dir() else "" if os.access(existing, os.W_OK) else "not writable"
        if problem:
            raise ConfigError(
                f"{folder} must be a folder to which the results can be written, and {existing} is {problem}; name one "
                "with --output"
            )
        board = None if found.kind == "export" else found.config_folder / "tensorboard" / name
        # A checkpoint has a file of its own, beside that of the newest one.
        parts = [*name.split("/"), *([found.path.name] if found.kind == "checkpoint" else [])]
        return cls(folder / f"{'-'.join(parts)}.json", board)
