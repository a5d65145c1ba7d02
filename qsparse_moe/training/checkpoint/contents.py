"""The files of tensors of a checkpoint behind its index, in the present format and in that of earlier versions.

Format 2: every rank has a safetensors file with the ranges of the global tensors that it saved, its random states, and
its monitors; the first one also has the model's buffers. The index lists the ranges of every parameter.

Format 1: every rank has a file of ``torch.save`` with the whole global tensors that it was dealt, read with
``weights_only``, because a checkpoint from elsewhere must not run code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from qsparse_moe.errors import CheckpointError
from qsparse_moe.training.checkpoint.rank_state import unpack_state
from qsparse_moe.training.checkpoint.state import tensor_name
from qsparse_moe.training.checkpoint.tensor_file import TensorFile
from qsparse_moe.training.engines.protocol import StateKind

FORMAT = "qsparse_moe.checkpoint/2"
OLD_FORMAT = "qsparse_moe.checkpoint/1"

T = TypeVar("T")
Broken = Callable[[Path, str], CheckpointError]
"""Return the error of a file, from its path and from what is wrong with it."""


class Contents(Protocol):
    """A reader of the files of one checkpoint. They are mapped: only what is used is read."""

    def read(self, kind: StateKind, name: str, start: int, stop: int) -> Tensor:
        """Return elements of a flattened global fp32 tensor."""

    def buffer(self, name: str) -> Tensor:
        """Return a buffer of the model."""

    def rank_state(self, rank: int) -> dict[str, Any]:
        """Return the states ``random`` and ``monitor`` of a rank."""


def rank_file(rank: int, world_size: int) -> str:
    """Return the name of the file of a rank."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


class RangeContents:
    """Files of format 2; see ``Contents``."""

    def __init__(self, folder: Path, index: dict[str, Any], broken: Broken) -> None:
        self._folder, self._index, self._broken = folder, index, broken
        self._files: dict[str, TensorFile] = {}

    def read(self, kind: StateKind, name: str, start: int, stop: int) -> Tensor:
        """See ``Contents``. A range that one rank saved is backed by its file; others are put together in memory."""
        pieces, end = [], start
        for first, last, rank in self._index["parameters"][name]["ranges"]:
            if first < stop and last > start:
                piece = self._tensor(rank, tensor_name(kind, name))
                pieces.append(piece[max(start - first, 0) : stop - first])
                end += len(pieces[-1])
        if end != stop:
            raise self._broken(self._folder, f"has {end - start} of the elements {start} to {stop} of {kind} of {name}")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.zeros(0)

    def buffer(self, name: str) -> Tensor:
        """See ``Contents``."""
        return self._tensor(0, f"buffer/{name}")

    def rank_state(self, rank: int) -> dict[str, Any]:
        """See ``Contents``."""
        return self._reading(rank, lambda file: unpack_state(file.metadata["state"], file.tensor))

    def _tensor(self, rank: int, name: str) -> Tensor:
        return self._reading(rank, lambda file: file.tensor(name))

    def _reading(self, rank: int, read: Callable[[TensorFile], T]) -> T:
        path = self._folder / rank_file(rank, self._index["world_size"])
        try:
            if path.name not in self._files:
                self._files[path.name] = TensorFile(path)
            return read(self._files[path.name])
        # All that ``TensorFile`` raises for a damaged file.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._broken(path, f"cannot be read ({_first_line(error)})") from error


class WholeTensorContents:
    """Files of format 1; see ``Contents``."""

    def __init__(self, folder: Path, index: dict[str, Any], broken: Broken) -> None:
        self._folder, self._index, self._broken = folder, index, broken
        self._files: dict[str, dict[str, Any]] = {}

    def read(self, kind: StateKind, name: str, start: int, stop: int) -> Tensor:
        """See ``Contents``."""
        whole = self._file(self._index["parameters"][name]["file"])["tensors"][kind][name]
        return whole.view(-1)[start:stop]

    def buffer(self, name: str) -> Tensor:
        """See ``Contents``."""
        return self._file(self._index["buffers"][name]["file"])["buffers"][name]

    def rank_state(self, rank: int) -> dict[str, Any]:
        """See ``Contents``."""
        return self._file(f"rank-{rank:05d}-of-{self._index['world_size']:05d}.pt")

    def _file(self, name: str) -> dict[str, Any]:
        if name not in self._files:
            path = self._folder / name
            try:
                self._files[name] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # torch's reader raises many types for a damaged file.
                raise self._broken(path, f"cannot be read ({_first_line(error)})") from error
        return self._files[name]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


FORMATS: dict[str, type[RangeContents] | type[WholeTensorContents]] = {
    FORMAT: RangeContents,
    OLD_FORMAT: WholeTensorContents,
}
"""The reader of each format."""
