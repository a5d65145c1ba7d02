"""Export a trained model in the format that other programs open, or in this package's own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qsparse_moe.interop.export_folder import PART_BYTES, Export, check_output
from qsparse_moe.interop.export_source import ExportDtype, open_source
from qsparse_moe.interop.family_export import export_family, family_of, no_family
from qsparse_moe.interop.state_dict import export_native
from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed

ExportFormat = Literal["auto", "hugging-face", "native"]


def export_model(
    source: Path | str,
    output: Path | str,
    *,
    format: ExportFormat = "auto",
    dtype: ExportDtype = "auto",
    force: bool = False,
    part_bytes: int = PART_BYTES,
    command: str | None = None,
    distributed: Distributed = ONE_RANK,
) -> Export:
    """Write the model of a run, of one checkpoint, or of an export to the folder ``output``.

    The folder has another name until it is complete. A few parts of tensors are held in memory at a time.

    Args:
        source: folder of a run, whose newest checkpoint is taken, of a checkpoint, or of an export.
        output: folder to create; with ``force``, an earlier export is replaced.
        format: ``hugging-face``: that of the family, such as Mixtral, that computes what the model computes;
            ``native``: this package's names and settings; ``auto``: the former where a family can express the model,
            and else the latter.
        dtype: type of the parameters; ``auto``: as they are stored. Buffers keep their own.
        force: see ``output``.
        part_bytes: maximum size of a file of weights, unless a single tensor is larger.
        command: the command line of the export, for the model card.
        distributed: the ranks that write the weights together, in the same files; they must call it together.

    Raises:
        CheckpointError: the source cannot be read, no family can express the model, or ``output`` is in use or cannot
            be written.
        BackendUnavailable: safetensors is not installed.
        ConfigError: the source's config.yaml cannot be read.
    """
    output = Path(output)
    # Before a checkpoint is read, which may take minutes if many ranks wrote it.
    distributed.on_rank_zero(lambda: check_output(output, force))
    opened = open_source(Path(source), distributed)
    model_type = None if format == "native" else family_of(opened)
    if model_type is not None:
        return export_family(
            opened, output, model_type, dtype=dtype, part_bytes=part_bytes, command=command, distributed=distributed
        )
    if format == "hugging-face":
        raise no_family(opened)
    return export_native(opened, output, dtype=dtype, part_bytes=part_bytes, command=command, distributed=distributed)
