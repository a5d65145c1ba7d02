"""The layout of checkpoints and their reader; ``save`` writes them.

A folder such as ``checkpoints/step-00000100/`` contains one safetensors file per rank
(``rank-00000-of-00002.safetensors``), each with the ranges of the global fp32 tensors that the rank saved.
``listeners.json`` has the states of the run's listeners, and ``state.json`` is the index. The folder is written under a
temporary name and renamed once all of it is on the disk, so a folder with a final name is always complete.
``contents`` describes the files, and reads those of earlier versions too.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.folder import CHECKPOINTS, UNFINISHED
from qsparse_moe.training.checkpoint.contents import FORMATS, Contents
from qsparse_moe.training.checkpoint.state import StoredWeights, check_shapes, load_buffers, stored_shapes
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import StateKind
from qsparse_moe.training.shard_weights import fill_model

INDEX = "state.json"
LISTENERS = "listeners.json"

# Eight digits sort by name; more are accepted for longer runs.
_FINAL = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class RunProgress:
    """The progress of a run."""

    step: int
    """Number of completed steps."""
    tokens: int
    """Number of tokens over all ranks."""
    seconds: float
    """Time spent in steps, without evaluations and checkpoints."""


@dataclass(frozen=True)
class ReportState:
    """State of reports and warnings that covers several steps; weights and data do not depend on it."""

    listeners: dict[str, dict[str, Any]] = field(default_factory=dict)
    """States of the listeners of rank 0 by name; JSON-able. No other rank saves any."""
    monitor: dict[str, Any] | None = None
    """State of this rank's monitors by name: tensors, numbers, texts, and lists and dicts of them; None: none."""
    evaluation_pending: bool = False
    """Whether an evaluation was due after the last step, and the run was stopped before it."""


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    root = run_dir / CHECKPOINTS
    found = {int(match[1]): path for path in _entries(root) if (match := _FINAL.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def remove_leftovers(run_dir: Path) -> None:
    """Remove the folders of a process that died while it saved or pruned; no other process may be saving."""
    for path in _entries(run_dir / CHECKPOINTS):
        if path.name.startswith(UNFINISHED):
            shutil.rmtree(path)


class Checkpoint:
    """A reader of one checkpoint; its files are memory-mapped and read when a tensor is used.

    Raises:
        CheckpointError: a file is missing, truncated, not readable, or of another version; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index_file = path / INDEX
        self._index = _read_index(self.index_file)
        self._contents: Contents = FORMATS[self._index["format"]](path, self._index, _broken)
        for name, facts in self._index["files"].items():
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            # The size is checked at once because it needs no reading; verify compares the content.
            if size != facts["bytes"]:
                raise _broken(
                    file, f"{'is missing' if size is None else f'has {size} bytes'} (expected: {facts['bytes']} bytes)"
                )

    @property
    def progress(self) -> RunProgress:
        """The progress of the run when it was saved."""
        return RunProgress(**self._index["progress"])

    @property
    def adam_step(self) -> int:
        """Adam's step counter."""
        return int(self._index["adam_step"])

    @property
    def loss_scale(self) -> dict[str, Any] | None:
        """State of the loss scaler of a run in fp16; None in other precisions."""
        return self._index.get("loss_scale")

    @property
    def step_filter(self) -> dict[str, Any] | None:
        """State of the step filter; None if the run had none."""
        return self._index.get("step_filter")

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote the checkpoint."""
        return int(self._index["world_size"])

    @property
    def checksums(self) -> dict[str, int]:
        """The CRC-32 that every file was written with, by name; ``verify`` compares them."""
        return {name: facts["crc32"] for name, facts in self._index["files"].items()}

    @property
    def data_state(self) -> dict[str, Any]:
        """State of the data loader, combined over the ranks."""
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
        # Checkpoints from before models had buffers lack this entry.
        return self._index.get("buffers", {})

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Verify the checksums of every ``parts``-th file, starting with file ``part``.

        Raises:
            CheckpointError: a file's content has changed since it was written.
        """
        # Not in __init__, so that the ranks of a run can divide the files among them.
        for name in sorted(self._index["files"])[part::parts]:
            checksum = file_checksum(self.path / name)
            if checksum != self._index["files"][name]["crc32"]:
                raise _broken(self.path / name, "does not have the checksum that it was written with")

    def read(self, kind: StateKind, name: str, start: int, stop: int) -> Tensor:
        """Return the elements from ``start`` to ``stop`` of a flattened global fp32 tensor, on the CPU.

        Only these are read. Do not modify the result, which may be backed by a file.
        """
        return self._contents.read(kind, name, start, stop)

    def tensor(self, kind: StateKind, name: str) -> Tensor:
        """Return the global fp32 tensor of a parameter, on the CPU; it may be backed by a file."""
        shape = self._index["parameters"][name]["shape"]
        return self.read(kind, name, 0, math.prod(shape)).view(shape)

    def weights(self) -> StoredWeights:
        """Return the source of the weights for a model; only the ranges that it fills are read."""
        return StoredWeights(functools.partial(self.read, "weight"))

    def buffer(self, name: str) -> Tensor:
        """Return a persistent buffer, on the CPU and backed by the file."""
        return self._contents.buffer(name)

    @property
    def has_report_state(self) -> bool:
        """True if the checkpoint has a ``ReportState``; checkpoints of earlier versions have none."""
        return "listeners" in self._index

    def report_state(self, rank: int) -> ReportState:
        """Return the report state of ``rank`` among the ``world_size`` ranks that wrote it, with all listeners."""
        file = self.path / self._index["listeners"]
        try:
            listeners = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _broken(file, f"cannot be read ({error})") from error
        return ReportState(listeners, self._contents.rank_state(rank)["monitor"], self._index["evaluation_pending"])

    def random_states(self, rank: int) -> dict[str, Any]:
        """Return the random states of ``rank`` among the ``world_size`` ranks that wrote the checkpoint."""
        return self._contents.rank_state(rank)["random"]


def newest_checkpoint(run_dir: Path, distributed: Distributed | None = None) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run, verified, or None. All ranks must call it together.

    Raises:
        CheckpointError: the checkpoint is damaged. An earlier one is never used silently instead.
    """
    paths = list_checkpoints(run_dir)
    if not paths:
        return None
    return verified_checkpoint(paths[-1], distributed)


def verified_checkpoint(path: Path, distributed: Distributed | None = None) -> Checkpoint:
    """Return the checkpoint in the folder ``path`` after all its files have been read and compared.

    The ranks, if given, divide the files among them, and must call it together.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = Checkpoint(path)
    if distributed is None:
        checkpoint.verify()
    else:
        distributed.on_every_rank(lambda: checkpoint.verify(part=distributed.rank, parts=distributed.world_size))
    return checkpoint


def load_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    distributed: Distributed | None = None,
) -> None:
    """Load a checkpoint's weights and buffers into a model, rounding to its dtype; of experts, this rank's shard.

    Parameters on the meta device receive memory on ``device`` in ``dtype``, and are divided over the ranks of
    ``distributed``.

    Raises:
        CheckpointError: it belongs to another model; the message names the first tensor that differs.
    """
    check_belongs(model, checkpoint)
    fill_model(model, checkpoint.weights(), device=device, dtype=dtype, distributed=distributed)
    load_buffers(model, checkpoint.buffer, checkpoint.buffer_shapes)


def check_belongs(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise unless the tensors of a checkpoint are those of the model, whose parameters may be on the meta device.

    Raises:
        CheckpointError: the message names the first tensor that differs.
    """
    check_shapes(stored_shapes(model), checkpoint.shapes | checkpoint.buffer_shapes, str(checkpoint.index_file))


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []


def file_checksum(file: Path) -> int:
    """Return the CRC-32 of a file's content."""
    crc32 = 0
    with file.open("rb") as stream:
        # In blocks of 4 MiB: files may be larger than the free memory.
        while block := stream.read(1 << 22):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(file, f"cannot be read ({error})") from error
    if version not in FORMATS:
        raise CheckpointError(
            f"{file}: has the format {version!r}, but this version of qsparse_moe reads {' and '.join(FORMATS)}; "
            "use the version that wrote it, which manifest.json of the run names"
        )
    return index


def _broken(file: Path, what: str) -> CheckpointError:
    folder = file if file.is_dir() else file.parent
    if not folder.exists():
        return CheckpointError(
            f"{folder}: was removed while it was read; a run keeps only its newest checkpoints (training.keep_last). "
            "Try again with the run's folder, which names the newest, or copy a checkpoint before it is read"
        )
    # The way out depends on it: without an earlier checkpoint the run starts again at step 0.
    paths = list_checkpoints(folder.parent.parent)
    earlier = paths[: paths.index(folder)] if folder in paths else []
    if earlier:
        way_out = f"Restore it from a copy, or delete the folder {folder} to continue from {earlier[-1]}"
    else:
        way_out = (
            f"There is no earlier checkpoint: restore it from a copy, or delete the folder {folder}, and "
            "training.resume=true starts again at step 0"
        )
    return CheckpointError(f"{file} {what}; a checkpoint is used only if all of its files are intact. {way_out}")
