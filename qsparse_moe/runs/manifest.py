"""``manifest.json``: the versions, commit, and machine of a run, so that its numbers can be traced."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qsparse_moe.runs.folder import MANIFEST_FILE, write_atomically
from qsparse_moe.version import __version__

# The packages whose version can change the numbers of a run.
_PACKAGES = (
    "torch",
    "deepspeed",
    "datasets",
    "tokenizers",
    "transformers",
    "triton",
    "megablocks",
    "grouped_gemm",
    "numpy",
)


def write_manifest(folder: Path, part: dict[str, Any]) -> None:
    """Write the manifest of the part of a run that starts now; it also contains those of earlier parts.

    Args:
        folder: the run folder.
        part: JSON-able; ``describe_environment()`` and what training adds to it.
    """
    file = folder / MANIFEST_FILE
    earlier: list[dict[str, Any]] = []
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        # Flat rather than nested: a run may be resumed hundreds of times.
        earlier = [*before.pop("earlier_parts", []), before]
    write_atomically(file, json.dumps(part | {"earlier_parts": earlier}, indent=1) + "\n")


def earlier_entry(folder: Path, name: str) -> Any:
    """Return an entry of the manifest that an earlier part of the run wrote; None without it."""
    file = folder / MANIFEST_FILE
    return json.loads(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None


def describe_environment() -> dict[str, Any]:
    """Return the versions, the git commit, and the machine of this process; JSON-able."""
    return {
        "qsparse_moe": __version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "git_commit": _git_commit(),
        # On many Linux systems platform.processor() is empty.
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """Return the commit of the checkout, with a mark if tracked files differ from it; None outside of a checkout."""
    # The commit of the code, not of the working directory, which may be a repository of the user.
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        # Untracked files are mostly runs and results, which do not change the code.
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit
