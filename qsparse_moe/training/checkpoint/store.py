"""Checkpoints that any engine, ZeRO stage and number of ranks writes and reads.

``checkpoints/step-00000100/`` holds ``rank-00000-of-00002.pt`` and so on, each with its share of the whole fp32
tensors and the first with the model's buffers, and ``state.json``, the index. It is written under another name and
renamed when all of it is on the disk: a folder with the final name is complete, whatever happened on the way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from qsparse_moe.errors import CheckpointError
from qsparse_moe.locks import flush
from qsparse_moe.runs.folder import CHECKPOINTS
from qsparse_moe.training.checkpoint.state import (
    Tensors,
    check_shapes,
    collect,
    collect_buffers,
    load_model,
    owners,
    random_states,
    state_buffers,
    stored_shapes,
)
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import Engine, StateKind

FORMAT = "qsparse_moe.checkpoint/1"
INDEX = "state.json"

_FINAL = re.compile(r"step-(\d{8,})")
_UNFINISHED = (".saving-", ".deleting-")


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come."""

    step: int
    """Steps done."""
    tokens: int
    """Over all ranks."""
    seconds: float
    """Spent in steps."""


def save_checkpoint(
    run_dir: Path, engine: Engine, progress: RunProgress, data_state: dict[str, Any], *, keep_last: int
) -> Path:
    """Write the checkpoint of ``progress.step`` and remove the oldest beyond ``keep_last``. All ranks call it.

    When it returns, the folder is complete and on the disk; whenever it is cut off, the checkpoints before it are
    untouched. One that is there already stays as it is.

    Args:
        run_dir: the run folder.
        engine: between two steps.
        progress: of the run.
        data_state: the loader's, combined over the ranks; JSON-able.
        keep_last: how many to keep, this one included.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    distributed = engine.distributed
    root = run_dir / CHECKPOINTS
    final = root / f"step-{progress.step:08d}"
    if distributed.on_rank_zero(final.exists):
        return final
    partial = root / f"{_UNFINISHED[0]}{final.name}"
    try:
        distributed.on_rank_zero(lambda: _make_empty(partial))
        share = collect(engine)
        buffers = collect_buffers(engine) if distributed.rank == 0 else {}
        name = f"rank-{distributed.rank:05d}-of-{distributed.world_size:05d}.pt"
        files = distributed.on_every_rank(lambda: _write_shard(partial / name, share, buffers))
        index = _index(engine, progress, data_state, files)
        distributed.on_rank_zero(lambda: _finish(partial, final, index))
        distributed.on_rank_zero(lambda: _prune(root, keep_last))
    except OSError as error:
        _remove(partial, distributed.rank)
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror or error}); it needs a folder that this user may write and "
            "free space. Make room, or move the run and set training.output_dir; the checkpoints before it are intact"
        ) from error
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    root = run_dir / CHECKPOINTS
    found = {int(match[1]): path for path in _entries(root) if (match := _FINAL.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a process that died while it saved or pruned left behind. Nobody else may be saving."""
    for path in _entries(run_dir / CHECKPOINTS):
        if path.name.startswith(_UNFINISHED):
            shutil.rmtree(path)


class Checkpoint:
    """A checkpoint to read from; files are mapped, not read, until a tensor is used.

    Raises:
        CheckpointError: a file is missing, cut off, not readable or of another version; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index_file = path / INDEX
        self._index = _read_index(self.index_file)
        self._contents: dict[str, dict[str, Any]] = {}
        for name, facts in self._index["files"].items():
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["bytes"]:
                raise _broken(file, f"has {'no file' if size is None else f'{size} bytes'}, not {facts['bytes']} bytes")

    @property
    def progress(self) -> RunProgress:
        """How far the run had come."""
        return RunProgress(**self._index["progress"])

    @property
    def adam_step(self) -> int:
        """Adam's step counter."""
        return int(self._index["adam_step"])

    @property
    def loss_scale(self) -> dict[str, Any] | None:
        """State of the loss scaler of a run in fp16."""
        return self._index.get("loss_scale")

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return int(self._index["world_size"])

    @property
    def data_state(self) -> dict[str, Any]:
        """The loader's state, combined over the ranks."""
        return self._index["data"]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter by name."""
        return {name: facts["shape"] for name, facts in self._index["parameters"].items()}

    @property
    def buffer_shapes(self) -> dict[str, list[int]]:
        """The shape of every buffer by name."""
        return {name: facts["shape"] for name, facts in self._buffers.items()}

    @property
    def _buffers(self) -> dict[str, Any]:
        # Checkpoints from before models had any do not say so.
        return self._index.get("buffers", {})

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Read every ``parts``-th file from ``part`` on and compare its checksum.

        Raises:
            CheckpointError: a file's content has changed since it was written.
        """
        for name in sorted(self._index["files"])[part::parts]:
            checksum = _checksum(self.path / name)
            if checksum != self._index["files"][name]["crc32"]:
                raise _broken(self.path / name, "does not have the checksum that it was written with")

    def tensor(self, kind: StateKind, name: str) -> Tensor:
        """The whole fp32 tensor of a parameter, on the CPU and backed by the file."""
        return self._content(self._index["parameters"][name]["file"])["tensors"][kind][name]

    def buffer(self, name: str) -> Tensor:
        """A buffer that is state, on the CPU and backed by the file."""
        return self._content(self._buffers[name]["file"])["buffers"][name]

    def random_states(self, rank: int) -> dict[str, Any]:
        """The random states of ``rank`` among the ``world_size`` that wrote it."""
        return self._content(f"rank-{rank:05d}-of-{self.world_size:05d}.pt")["random"]

    def _content(self, name: str) -> dict[str, Any]:
        if name not in self._contents:
            try:
                self._contents[name] = torch.load(self.path / name, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # of many types: whatever torch's reader stumbles over
                raise _broken(self.path / name, f"cannot be read ({str(error).splitlines()[0]})") from error
        return self._contents[name]


def newest_checkpoint(run_dir: Path, distributed: Distributed | None = None) -> Checkpoint | None:
    """The newest complete checkpoint of a run, verified; None where there is none. All ranks call it together.

    Raises:
        CheckpointError: it is damaged. An older one is never taken instead by itself.
    """
    paths = list_checkpoints(run_dir)
    if not paths:
        return None
    checkpoint = Checkpoint(paths[-1])
    if distributed is None:
        checkpoint.verify()
    else:
        distributed.on_every_rank(lambda: checkpoint.verify(part=distributed.rank, parts=distributed.world_size))
    return checkpoint


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights and buffers into a model, rounding to their dtype.

    Raises:
        CheckpointError: it is of another model; the message names the first tensor that differs.
    """
    check_shapes(stored_shapes(model), checkpoint.shapes | checkpoint.buffer_shapes, str(checkpoint.index_file))
    load_model(model, checkpoint.tensor, checkpoint.buffer)


def _index(
    engine: Engine, progress: RunProgress, data_state: dict[str, Any], files: list[dict[str, Any]]
) -> dict[str, Any]:
    owner = owners(engine.shapes(), engine.distributed.world_size)
    parameters = {
        name: {"shape": list(shape), "file": files[owner[name]]["name"]} for name, shape in engine.shapes().items()
    }
    return {
        "format": FORMAT,
        "progress": {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds},
        "adam_step": engine.adam_step,
        "loss_scale": None if engine.loss_scaler is None else engine.loss_scaler.state_dict(),
        "world_size": engine.distributed.world_size,
        "data": data_state,
        "files": {file["name"]: {"bytes": file["bytes"], "crc32": file["crc32"]} for file in files},
        "parameters": parameters,
        "buffers": {
            name: {"shape": list(value.shape), "file": files[0]["name"]}
            for name, value in state_buffers(engine.model).items()
        },
    }


class _Checksummed:
    """A file to write to that adds up what goes into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_shard(path: Path, share: Tensors, buffers: dict[str, Tensor]) -> dict[str, Any]:
    with path.open("wb") as file:
        writer = _Checksummed(file)
        content = {"tensors": share, "buffers": buffers, "random": random_states()}
        try:
            torch.save(content, cast(BinaryIO, writer))
        except RuntimeError:
            # torch's writer says only that it ended at an unexpected place.
            if writer.error is not None:
                raise writer.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
        return {"name": path.name, "bytes": file.tell(), "crc32": writer.crc32}


def _remove(partial: Path, rank: int) -> None:
    """Give the space of a checkpoint that could not be written back."""
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path, index: dict[str, Any]) -> None:
    with (partial / INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush(partial)
    partial.rename(final)
    flush(final.parent)


def _prune(root: Path, keep_last: int) -> None:
    for path in list_checkpoints(root.parent)[:-keep_last]:
        # Renamed first: half of a folder must never have a final name.
        doomed = path.with_name(f"{_UNFINISHED[1]}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []


def _checksum(file: Path) -> int:
    crc32 = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(file, f"cannot be read ({error})") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{file}: has the format {version!r}, and this version of qsparse_moe reads {FORMAT!r}; "
            "use the version that wrote it (manifest.json of the run names it)"
        )
    return index


def _broken(file: Path, what: str) -> CheckpointError:
    folder = file.parent
    paths = list_checkpoints(folder.parent.parent)
    earlier = paths[: paths.index(folder)] if folder in paths else []
    if earlier:
        way_out = f"Restore it from a copy, or delete the folder {folder} to go on from {earlier[-1]}"
    else:
        way_out = (
            f"There is none before it: restore it from a copy, or delete the folder {folder}, and training.resume=true "
            "begins again at step 0"
        )
    return CheckpointError(f"{file} {what}; a checkpoint is used whole or not at all. {way_out}")
