"""Check a run folder named on the command line before any heavy import."""

from __future__ import annotations

import difflib
from pathlib import Path

from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.folder import CONFIG_FILE


def find_run(path: Path) -> Path:
    """Return ``path`` if it is a run folder.

    Raises:
        CheckpointError: it is not one; the message names the run folders beside it.
    """
    if (path / CONFIG_FILE).is_file():
        return path
    problem = "does not exist" if not path.exists() else f"is not a run folder: it contains no {CONFIG_FILE}"
    found = _runs_in(path.parent) or _runs_in(path)
    names = difflib.get_close_matches(path.name, [run.name for run in found], n=3, cutoff=0) if found else []
    nearest = ", such as " + ", ".join(str(found[0].parent / name) for name in names) if names else ""
    raise CheckpointError(f"{path} {problem}; name a folder made by qsparse-moe train{nearest}")


def _runs_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if (entry / CONFIG_FILE).is_file())
    except OSError:
        return []
