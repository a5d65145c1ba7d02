"""Write the folder of an export: weights in safetensors files, the configuration, and whatever belongs to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsparse_moe.errors import CheckpointError
from qsparse_moe.interop.safetensors_writer import SafetensorsFile, TensorSpec
from qsparse_moe.interop.weight_files import INDEX, WEIGHTS, open_safetensors, safetensors_torch
from qsparse_moe.runs.folder import CONFIG_FILE
from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed

PART_BYTES = 4 * 2**30
"""Maximum size of one file, unless a single tensor is larger."""


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
    model_type: str = "qsparse_moe"
    """Family of the format, or ``qsparse_moe`` for this package's own."""


def write_export(
    output: Path,
    tensors: Mapping[str, TensorSpec],
    *,
    metadata: Mapping[str, str],
    write_rest: Callable[[Path], None],
    part_bytes: int = PART_BYTES,
    model_type: str = "qsparse_moe",
    distributed: Distributed = ONE_RANK,
) -> Export:
    """Write an export, under another name until it is complete. At most its largest tensor is held in memory.

    Args:
        output: folder to create, which ``check_output`` has accepted.
        tensors: the tensors by name, in the order of the files.
        metadata: metadata of each file; ``step`` is the number of steps that the weights were trained.
        write_rest: writes the configuration and everything else into the folder that it receives.
        part_bytes: maximum size of a file, unless a single tensor is larger.
        model_type: see ``Export``.
        distributed: the ranks, which must call it together on a file system that they share: each writes its part of
            every file, and rank 0 everything else.

    Raises:
        CheckpointError: ``output`` cannot be written.
    """
    partial = output.with_name(f".{output.name}.partial")
    # As transformers writes it: several of its versions refuse a file that does not name its framework.
    files = _files(partial, tensors, {"format": "pt"} | dict(metadata), part_bytes)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in files:
            file.create()

    def finish() -> None:
        _write_index(partial, tensors, files)
        write_rest(partial)
        _open_to_readers(partial)
        _put_in_place(partial, output)

    try:
        distributed.on_rank_zero(begin)
        distributed.on_every_rank(lambda: _write_parts(files, distributed))
        distributed.on_rank_zero(finish)
    except OSError as error:
        _remove(partial, distributed)
        raise CheckpointError(
            f"{output}: cannot be written ({error.strerror or error}); it needs write permission and free space; "
            "free some space, or name another folder"
        ) from error
    except BaseException:
        # A tensor of the source is damaged, or the user interrupts.
        _remove(partial, distributed)
        raise
    return Export(output, int(metadata["step"]), len(tensors), sum(_sizes(tensors).values()), len(files), model_type)


def _write_parts(files: Sequence[SafetensorsFile], distributed: Distributed) -> None:
    for file in files:
        file.write(part=distributed.rank, parts=distributed.world_size)


def _remove(partial: Path, distributed: Distributed) -> None:
    if distributed.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path, force: bool) -> None:
    """Check, before anything is read, that an export can be written to the folder ``output``.

    Raises:
        CheckpointError: it is in use, or ``force`` is set and it is not an earlier export.
        BackendUnavailable: safetensors is not installed.
    """
    safetensors_torch()
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise CheckpointError(
            f"{output}: exists, and an export does not overwrite it; name another folder, or replace an earlier "
            "export with --force"
        )
    # --force must never delete a folder that merely has the same name.
    if not _is_export(output):
        raise CheckpointError(
            f"{output}: is not an earlier export, so --force does not replace it; name another folder"
        )


def _is_export(folder: Path) -> bool:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return False
    if (folder / CONFIG_FILE).is_file():
        return True
    # A downloaded model has the same files as an export in its family's format, apart from this entry.
    try:
        return "qsparse_moe" in (open_safetensors(files[0], "").metadata() or {})
    except CheckpointError:
        return False


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
    """Give the files the default mode, also those that were copied with their own."""
    mode = folder.stat().st_mode & 0o666  # what the umask left of a new folder's 0777
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def group_by_size(sizes: Mapping[str, int], part_bytes: int) -> list[list[str]]:
    """Return the names in order, in groups of at most ``part_bytes``; a larger tensor is a group by itself."""
    parts: list[list[str]] = []
    space_left = 0
    for name, size in sizes.items():
        if not parts or size > space_left:
            parts.append([])
            space_left = part_bytes
        parts[-1].append(name)
        space_left -= size
    return parts


def _files(
    folder: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str], part_bytes: int
) -> list[SafetensorsFile]:
    """Return the files of the tensors, none of which is written yet."""
    parts = group_by_size(_sizes(tensors), part_bytes)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [WEIGHTS]
    return [
        SafetensorsFile(folder / name, {tensor: tensors[tensor] for tensor in part}, metadata)
        for name, part in zip(names, parts, strict=True)
    ]


def _write_index(folder: Path, tensors: Mapping[str, TensorSpec], files: Sequence[SafetensorsFile]) -> None:
    """Write the list of the files if there are several."""
    if len(files) == 1:
        return
    where = {name: file.path.name for file in files for name in file.tensors}
    index = {"metadata": {"total_size": sum(_sizes(tensors).values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _sizes(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    return {name: spec.nbytes for name, spec in tensors.items()}
