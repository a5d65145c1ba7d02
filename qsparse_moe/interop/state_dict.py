"""Export a run's weights as one state dict in safetensors files with its config, and load such an export.

The folder is laid out as the ecosystem's tools read it: ``model.safetensors``, or numbered parts and
``model.safetensors.index.json`` where it is large. The names are those of the model's state dict.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qsparse_moe.config.overrides import override_of
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.weight_files import FORMAT, INDEX, WEIGHTS, WeightFiles, safetensors_torch
from qsparse_moe.model.transformer import Transformer, build_model
from qsparse_moe.runs.folder import CONFIG_FILE, TOKENIZER, load_run_config, no_checkpoint, write_config
from qsparse_moe.sparsity.schedule import scheduled_scale
from qsparse_moe.training.checkpoint.state import check_shapes, load_model, stored_shapes
from qsparse_moe.training.checkpoint.store import Checkpoint, newest_checkpoint
from qsparse_moe.training.engines.protocol import COMPUTE_DTYPES

Dtype = Literal["fp32", "bf16"]

PLAN_FILE = "plan.json"
PART_BYTES = 4 * 2**30
"""Maximum size of one file, and of the memory that an export needs in addition to its largest tensor."""


@dataclass(frozen=True)
class Export:
    """Summary of an export."""

    folder: Path
    step: int
    """Number of steps that the weights were trained."""
    tensors: int
    bytes: int
    """Size of all tensors."""
    files: int


def export_run(
    run_dir: Path, output: Path, *, dtype: Dtype = "fp32", force: bool = False, part_bytes: int = PART_BYTES
) -> Export:
    """Write the weights of a run's newest checkpoint, of any number of ranks and ZeRO stage, to the folder ``output``.

    Tensors are read from the checkpoint one by one and written file by file, under another name until all are complete.

    Args:
        run_dir: a run folder.
        output: folder to create; with ``force``, an earlier export is replaced.
        dtype: type of the parameters; buffers keep their own.
        force: see ``output``.
        part_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or ``output`` is in use or cannot be written.
        BackendUnavailable: safetensors is not installed.
    """
    # Both checks come first, because reading a checkpoint of many ranks may take minutes.
    safetensors_torch()
    _check_output(output, force)
    config = load_run_config(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise no_checkpoint(run_dir)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        source = _Source(checkpoint, COMPUTE_DTYPES[dtype])
        # As transformers writes it: several of its versions refuse a file that does not name its framework.
        metadata = {"format": "pt", "qsparse_moe": FORMAT, "step": str(checkpoint.progress.step)}
        files = _write_weights(partial, source, metadata, part_bytes)
        _write_config(partial, config, run_dir)
        _open_to_readers(partial)
        _put_in_place(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{output}: cannot be written ({error.strerror or error}); it needs write permission and free space; "
            "free some space, or name another folder"
        ) from error
    return Export(output, checkpoint.progress.step, len(source.sizes), sum(source.sizes.values()), files)


def load_export(
    folder: Path | str, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None
) -> tuple[RunConfig, Transformer, int]:
    """Return the config, the model, and its number of trained steps, as ``training.evaluate.load_run`` does for a run.

    Args:
        folder: the folder of an export.
        device: device of the model.
        dtype: type of the model; None: that of the file.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
        BackendUnavailable: safetensors is not installed.
        ConfigError: its config.yaml cannot be read.
    """
    folder = Path(folder)
    files = WeightFiles(folder)
    plan = folder / PLAN_FILE
    # The config names the plan by its path on the machine of the training; the export contains a copy of it.
    config = load_run_config(folder, [override_of("model.sparsity.plan", str(plan))] if plan.is_file() else [])
    dtype = dtype or files.tensor("embedding.weight").dtype
    model = build_model(config.model, device=device, dtype=dtype, seed=config.training.seed)
    check_shapes(stored_shapes(model), files.shapes, str(folder))
    load_model(model, lambda kind, name: files.tensor(name), files.tensor)
    # The plan of the last trained step: a run may have ended during the ramp of its sparsity schedule.
    scale = scheduled_scale(config.model.sparsity.schedule, max(0, files.step - 1))
    model.set_sparsity(model.sparsity_plan.scaled(scale))
    return config, model.eval(), files.step


def _check_output(output: Path, force: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise CheckpointError(
            f"{output}: exists, and an export does not overwrite it; name another folder, or replace an earlier "
            "export with --force"
        )
    # --force must never delete a folder that merely has the same name.
    if not (output / CONFIG_FILE).is_file() or not any(output.glob("model*.safetensors")):
        raise CheckpointError(
            f"{output}: is not an earlier export, so --force does not replace it; name another folder"
        )


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename the export; an empty folder or an earlier export in its place is removed once the new one is complete."""
    before = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(before, ignore_errors=True)
    # Renamed, not deleted: a process killed here leaves either the old export or the new one complete.
    if output.exists():
        output.rename(before)
    try:
        partial.rename(output)
    except OSError:
        # The earlier export would otherwise be hidden under another name, which the next export removes.
        if before.exists():
            before.rename(output)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give the files the default mode: safetensors creates files that only their owner can read."""
    mode = folder.stat().st_mode & 0o666  # what the umask left of a new folder's 0777
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


class _Source:
    """The weights and buffers of a checkpoint by name, in the types of the export; read on access."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self.sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in checkpoint.shapes.items()}
        self.sizes |= {name: checkpoint.buffer(name).nbytes for name in checkpoint.buffer_shapes}

    def tensor(self, name: str) -> Tensor:
        if name in self._checkpoint.shapes:
            # safetensors refuses tensors that are not contiguous.
            return self._checkpoint.tensor("weight", name).to(self._dtype).contiguous()
        return self._checkpoint.buffer(name).contiguous()

    def parts(self, part_bytes: int) -> list[list[str]]:
        """Return the names in order, in groups of at most ``part_bytes``; a larger tensor is a group by itself."""
        parts: list[list[str]] = []
        space_left = 0
        for name, size in self.sizes.items():
            if not parts or size > space_left:
                parts.append([])
                space_left = part_bytes
            parts[-1].append(name)
            space_left -= size
        return parts


def _write_weights(folder: Path, source: _Source, metadata: dict[str, str], part_bytes: int) -> int:
    """Write the files of the state dict and return their number."""
    parts = source.parts(part_bytes)
    files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [WEIGHTS]
    for file, names in zip(files, parts, strict=True):
        _save_file({name: source.tensor(name) for name in names}, folder / file, metadata)
    if len(parts) > 1:
        where = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(source.sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return len(files)


def _save_file(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write one file. The library wraps an OSError in its own error with the number in the text: raise the original."""
    library = safetensors_torch()
    try:
        library.save_file(tensors, file, metadata=metadata)
    except import_module("safetensors").SafetensorError as error:
        # Its versions write "(os error 28)" or "Os { code: 28, ...".
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def _write_config(folder: Path, config: RunConfig, run_dir: Path) -> None:
    write_config(folder, config)
    # The export is used on its own, also where the run folder is gone.
    if (run_dir / TOKENIZER).is_dir():
        shutil.copytree(run_dir / TOKENIZER, folder / TOKENIZER)
    if config.model.sparsity.plan is not None:
        shutil.copyfile(config.model.sparsity.plan, folder / PLAN_FILE)
