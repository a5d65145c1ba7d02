"""Export a run's weights as one state dict in safetensors files with its config, and load such an export.

The folder is laid out as the ecosystem's tools read it: ``model.safetensors``, or numbered parts and
``model.safetensors.index.json`` where it is large. The names are those of the model's state dict.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.export_folder import PART_BYTES, Export, check_output, write_export
from qsparse_moe.interop.safetensors_writer import TensorSpec
from qsparse_moe.interop.weight_files import WeightFiles, export_metadata
from qsparse_moe.model.transformer import Transformer, build_model
from qsparse_moe.runs.folder import PLAN_FILE, TOKENIZER, load_run_config, no_checkpoint, write_config
from qsparse_moe.sparsity.schedule import scheduled_scale
from qsparse_moe.training.checkpoint.state import check_shapes, load_model, stored_shapes
from qsparse_moe.training.checkpoint.store import Checkpoint, newest_checkpoint
from qsparse_moe.training.engines.protocol import COMPUTE_DTYPES

Dtype = Literal["fp32", "bf16"]


def export_run(
    run_dir: Path, output: Path, *, dtype: Dtype = "fp32", force: bool = False, part_bytes: int = PART_BYTES
) -> Export:
    """Write the weights of a run's newest checkpoint, of any number of ranks and ZeRO stage, to the folder ``output``.

    It has another name until it is complete. At most its largest tensor is held in memory.

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
    # Before the checkpoint is read, which may take minutes if many ranks wrote it.
    check_output(output, force)
    config = load_run_config(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise no_checkpoint(run_dir)
    return write_export(
        output,
        _specs(checkpoint, COMPUTE_DTYPES[dtype]),
        metadata=export_metadata(step=checkpoint.progress.step),
        write_rest=lambda folder: _write_config(folder, config, run_dir),
        part_bytes=part_bytes,
    )


def load_export(
    folder: Path | str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    overrides: Sequence[str] = (),
) -> tuple[RunConfig, Transformer, int]:
    """Return the config, the model, and its number of trained steps, as ``training.evaluate.load_run`` does for a run.

    Args:
        folder: the folder of an export.
        device: device of the model.
        dtype: type of the model; None: that of the file.
        overrides: settings that do not affect the weights, as in ``load_run``.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
        BackendUnavailable: safetensors is not installed.
        ConfigError: its config.yaml cannot be read.
    """
    folder = Path(folder)
    files = WeightFiles(folder)
    config = load_run_config(folder, overrides)
    dtype = dtype or files.tensor("embedding.weight").dtype
    model = build_model(config.model, device=device, dtype=dtype, seed=config.training.seed)
    check_shapes(stored_shapes(model), files.shapes, str(folder))
    load_model(model, lambda kind, name: files.tensor(name), files.tensor)
    # The plan of the last trained step: a run may have ended during the ramp of its sparsity schedule.
    scale = scheduled_scale(config.model.sparsity.schedule, max(0, files.step - 1))
    model.set_sparsity(model.sparsity_plan.scaled(scale))
    return config, model.eval(), files.step


def _specs(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return the weights, of ``dtype``, and the buffers, of their own dtypes; they are read when they are written."""
    specs = {
        name: TensorSpec.whole(dtype, shape, partial(checkpoint.tensor, "weight", name))
        for name, shape in checkpoint.shapes.items()
    }
    return specs | {
        name: TensorSpec.whole(checkpoint.buffer(name).dtype, shape, partial(checkpoint.buffer, name))
        for name, shape in checkpoint.buffer_shapes.items()
    }


def _write_config(folder: Path, config: RunConfig, run_dir: Path) -> None:
    write_config(folder, config)
    # The export is used on its own, also where the run folder is gone.
    if (run_dir / TOKENIZER).is_dir():
        shutil.copytree(run_dir / TOKENIZER, folder / TOKENIZER)
    if config.model.sparsity.plan is not None:
        shutil.copyfile(config.model.sparsity.plan, folder / PLAN_FILE)
