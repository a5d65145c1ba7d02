"""``manifest.json``: what a run was made with, so that its numbers can be traced."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.training.engine import Engine
from qsparse_moe.training.run_folder import MANIFEST_FILE, write_whole
from qsparse_moe.version import __version__

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


def write_manifest(folder: Path, config: RunConfig, engine: Engine, *, start_step: int, fingerprint: str) -> None:
    """Write the manifest of the part of the run that begins at ``start_step``; those of earlier parts stay in it."""
    file = folder / MANIFEST_FILE
    earlier: list[dict[str, Any]] = []
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier_parts", []), before]
    manifest = describe_part(config, engine, start_step=start_step, fingerprint=fingerprint)
    write_whole(file, json.dumps(manifest | {"earlier_parts": earlier}, indent=1) + "\n")


def describe_part(config: RunConfig, engine: Engine, *, start_step: int, fingerprint: str) -> dict[str, Any]:
    """Versions, commit, layout, what ``auto`` came to, DeepSpeed's dictionary, seeds and threads; JSON-able."""
    return {
        "qsparse_moe": __version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "git_commit": _git_commit(),
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine()},
        "start_step": start_step,
        "world_size": engine.distributed.world_size,
        "device": _device_name(engine.distributed.device),
        "torch_threads": torch.get_num_threads(),
        "backends": engine.model.runtime.names,
        "engine": engine.describe(),
        "seeds": {"weights": config.training.seed, "data": config.training.seed, "noise": config.training.seed},
        "data_fingerprint": fingerprint,
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
    """The commit of the checkout that this package runs from, with a mark if files differ; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
