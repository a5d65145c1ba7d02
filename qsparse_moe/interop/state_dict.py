"""Export a run's weights as one state dict in safetensors files with its config, and load such an export.

The folder is laid out as the ecosystem's tools read it: ``model.safetensors``, or numbered parts and
``model.safetensors.index.json`` where it is large. The names are those of the model's state dict.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.interop.auto_model.settings import config_json
from qsparse_moe.interop.companion_files import generation_settings, token_ids, write_companions, write_json
from qsparse_moe.interop.export_folder import PART_BYTES, Export, check_output, write_export
from qsparse_moe.interop.export_source import ExportDtype, ExportSource, open_source, plan_in_use
from qsparse_moe.interop.families.settings import CONFIG_JSON
from qsparse_moe.interop.weight_files import WeightFiles, export_metadata
from qsparse_moe.model.transformer import Transformer, build_empty
from qsparse_moe.runs.folder import PLAN_FILE, TOKENIZER, load_run_config, write_config
from qsparse_moe.training.checkpoint.state import check_shapes, load_model, stored_shapes
from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed
from qsparse_moe.training.shard_weights import choose_sharding


def export_run(
    run_dir: Path, output: Path, *, dtype: ExportDtype = "fp32", force: bool = False, part_bytes: int = PART_BYTES
) -> Export:
    """Write the weights of a run's newest checkpoint, of any number of ranks and ZeRO stage, to the folder ``output``.

    The folder has another name until it is complete. At most its largest tensor is held in memory. ``export_model``
    also reads single checkpoints and exports, writes other formats, and by default keeps the stored dtype.

    Args:
        run_dir: a run folder.
        output: folder to create; with ``force``, an earlier export is replaced.
        dtype: type of the parameters, fp32 by default; buffers keep their own.
        force: see ``output``.
        part_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or ``output`` is in use or cannot be written.
        BackendUnavailable: safetensors is not installed.
    """
    # Before the checkpoint is read, which may take minutes if many ranks wrote it.
    check_output(output, force)
    return export_native(open_source(run_dir), output, dtype=dtype, part_bytes=part_bytes)


def export_native(
    source: ExportSource,
    output: Path,
    *,
    dtype: ExportDtype,
    part_bytes: int = PART_BYTES,
    command: str | None = None,
    distributed: Distributed = ONE_RANK,
) -> Export:
    """Write the export that ``load_export`` reads, and transformers as model type ``qsparse_moe``.

    See ``export_model.export_model`` for the arguments.
    """
    return write_export(
        output,
        source.specs(dtype),
        metadata=export_metadata(step=source.step, max_length=source.max_length, family=source.family),
        write_rest=lambda folder: _write_rest(folder, source, dtype, command),
        part_bytes=part_bytes,
        distributed=distributed,
    )


def load_export(
    folder: Path | str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    overrides: Sequence[str] = (),
    distributed: Distributed | None = None,
    shard: bool | None = None,
) -> tuple[RunConfig, Transformer, int]:
    """Return the config, the model, and its number of trained steps, as ``training.evaluate.load_run`` does for a run.

    Args:
        folder: the folder of an export.
        device: device of the model.
        dtype: type of the model; None: that of the file.
        overrides: settings that do not affect the weights, as in ``load_run``.
        distributed: as in ``load_run``.
        shard: as in ``load_run``.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
        BackendUnavailable: safetensors is not installed.
        ConfigError: its config.yaml cannot be read.
    """
    folder = Path(folder)
    files = WeightFiles(folder)
    config = load_run_config(folder, overrides)
    dtype = dtype or files.tensor("embedding.weight").dtype
    model = build_empty(config.model, device=device)
    check_shapes(stored_shapes(model), files.shapes, str(folder))
    over = choose_sharding(shard, config, distributed)
    load_model(model, files.tensor, files.shapes, device=device, dtype=dtype, distributed=over)
    model.set_sparsity(plan_in_use(config, files.step))
    return config, model.eval(), files.step


def _write_rest(folder: Path, source: ExportSource, dtype: ExportDtype, command: str | None) -> None:
    write_config(folder, source.config)
    # The export is used on its own, also where the source is gone.
    if (source.folder / TOKENIZER).is_dir():
        shutil.copytree(source.folder / TOKENIZER, folder / TOKENIZER)
    if source.config.model.sparsity.plan is not None:
        shutil.copyfile(source.config.model.sparsity.plan, folder / PLAN_FILE)
    write_companions(folder, source, dtype, command=command)
    stored = str(source.dtype("embedding.weight", dtype)).removeprefix("torch.")
    settings = config_json(source.config.model, source.plan, dtype=stored, max_length=source.max_length)
    write_json(folder / CONFIG_JSON, settings | token_ids(generation_settings(source)))
