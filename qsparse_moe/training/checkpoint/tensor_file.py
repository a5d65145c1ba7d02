"""Safetensors files of checkpoints: written in blocks with their checksum, and mapped to read ranges of them.

A file is a header in JSON, with the offset of every tensor, and then the bytes of the tensors. It is written and read
here and not by the library safetensors, which is an optional dependency and joins all bytes in memory to write them.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in the format."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Small enough for the caches: the checksum then reads what the copy into the page cache reads again.
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: its dtype and shape, and a function that returns it, on any device."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, value: Tensor) -> TensorSource:
        """Return the source of a tensor that exists already."""
        return cls(value.dtype, tuple(value.shape), lambda: value)


@dataclass(frozen=True)
class FileFacts:
    """The size and checksum that a file was written with."""

    bytes: int
    crc32: int


def write_tensors(path: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> FileFacts:
    """Write a file of contiguous tensors, one after the other, and wait until it is on the disk.

    Raises:
        OSError: it cannot be written; the file is then incomplete.
    """
    header, starts = safetensors_header({name: (one.dtype, one.shape) for name, one in tensors.items()}, metadata)
    return write_blocks(path, _blocks(header, [tensors[name] for name in starts]))


def write_blocks(path: Path, blocks: Iterator[bytes | memoryview]) -> FileFacts:
    """Write a file and wait until it is on the disk; the checksum is computed on the way.

    Raises:
        OSError: it cannot be written.
    """
    # Not by reading the file back, which would take as long again.
    crc32 = size = 0
    with path.open("wb") as file:
        for block in blocks:
            crc32 = zlib.crc32(block, crc32)
            size += len(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(size, crc32)


def _blocks(header: bytes, tensors: Sequence[TensorSource]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        flat = tensor.read().detach().cpu().view(-1).view(torch.uint8)
        for block in flat.split(_BLOCK_BYTES):
            yield block.numpy().data


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the header with its length in front, and the offset of each tensor in the file, in the file's order.

    Args:
        tensors: dtype and shape by name.
        metadata: further entries of the header.
    """
    # Wider types first, so that every tensor is aligned to its own size.
    names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in names:
        dtype, shape = tensors[name]
        offsets[name] = end
        end += math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


class TensorFile:
    """A reader of one file, which is mapped: only the parts of it that are used are read.

    Raises:
        OSError, ValueError, KeyError, TypeError, RuntimeError: the file is damaged, here or in ``tensor``.
    """

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"its header has {length} bytes, and the file {size}")
            self._entries: dict[str, Any] = json.loads(file.read(length))
        self.metadata: dict[str, str] = self._entries.pop("__metadata__", {})
        """The further entries of the header."""
        self._start = 8 + length
        # Private, so that nothing that is done to a tensor reaches the file.
        self._bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, backed by the file."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        content = self._bytes[self._start + begin : self._start + end]
        return content.view(_DTYPES[entry["dtype"]]).view(entry["shape"])
