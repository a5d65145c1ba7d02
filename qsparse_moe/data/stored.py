"""The tokens of a source on the disk: flat memory-mapped files in shards, and a manifest that describes them.

The files of all shards, one after the other, are one long array of token ids per side. A sequence of text is the S + 1
tokens from a multiple of S on, wherever a shard ends, so the sequences do not depend on the division into shards, and S
may be chosen when they are read. Conversations are not cut: their sequences of S + 1 tokens are stored as they are.

``manifest.json`` is written last and makes a table complete. It has a constant number of entries per shard, and nothing
else is read to open a table; a file is mapped when a sequence in it is first used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from qsparse_moe.data.packing import Array
from qsparse_moe.errors import DataError

logger = logging.getLogger(__name__)

Side = Literal["train", "validation"]
SIDES: tuple[Side, ...] = ("train", "validation")

MANIFEST = "manifest.json"
TABLE_FORMAT = 1
"""Part of every manifest; increased when the files are laid out differently."""

BYTE_COUNTS_TYPE = np.dtype("<u4")
# A mapped file keeps a descriptor, of which a process usually has 1024.
_MAX_MAPPED = 256
_READ_BYTES = 1 << 22


class SideTable(Protocol):
    """The sequences of one side of one source."""

    @property
    def byte_counts(self) -> Array:
        """``(256,)`` how often each byte value occurs in the side's text."""

    @property
    def sequence_length(self) -> int:
        """S, the number of tokens per sequence."""

    def __len__(self) -> int:
        """Return the number of sequences."""

    def tokens(self, index: int) -> Array:
        """Return the ``(S + 1,)`` token ids of a sequence."""

    def num_bytes(self, index: int) -> int:
        """Return the bytes of text that the labels of a sequence encode."""


@dataclass(frozen=True)
class SequenceArray:
    """Sequences in memory."""

    rows: Array
    """``(R, S + 1)`` token ids."""
    bytes_per_row: Array
    """``(R,)`` bytes of text that each sequence's labels encode."""
    byte_counts: Array
    """``(256,)`` how often each byte value occurs in the text."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sequence_length(self) -> int:
        """S, the number of tokens per sequence."""
        return int(self.rows.shape[1]) - 1

    def tokens(self, index: int) -> Array:
        """Return the ``(S + 1,)`` token ids of a sequence."""
        row: Array = self.rows[index]
        return row

    def num_bytes(self, index: int) -> int:
        """Return the bytes of text that the labels of a sequence encode."""
        return int(self.bytes_per_row[index])


class FlatFiles:
    """Files of little-endian integers as one array, without reading them.

    Args:
        files: the files in order.
        lengths: number of elements in each.
        dtype: type of the elements.
    """

    def __init__(self, files: Sequence[str], lengths: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._files, self._lengths, self._dtype = files, lengths, dtype
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._map = lru_cache(maxsize=_MAX_MAPPED)(self._mapped)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, begin: int, length: int) -> Array:
        """Return ``length`` elements from ``begin`` on: a view of the mapped file unless a file ends between them."""
        pieces = []
        number = int(np.searchsorted(self._ends, begin, side="right"))
        while length:
            first = begin - int(self._ends[number - 1] if number else 0)
            pieces.append(self._map(number)[first : first + length])
            begin, length = begin + len(pieces[-1]), length - len(pieces[-1])
            # Files may be empty.
            number = int(np.searchsorted(self._ends, begin, side="right"))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _mapped(self, number: int) -> Array:
        file = self._files[number]
        try:
            with open(file, "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise _lost(file, f"cannot be read any more ({error})") from error
        if len(mapped) != self._lengths[number] * self._dtype.itemsize:
            raise _lost(file, f"has {len(mapped)} bytes now")
        # Sequences are read in random order: reading ahead took 2.5 ms per first use of a file, and this takes 0.1 ms.
        mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, self._dtype)


def _lost(file: str, problem: str) -> DataError:
    return DataError(
        f"data.cache_dir: {file} {problem}, and the tokens must stay as they are while a run reads them; make them "
        "again with `qsparse-moe prepare`, and resume the run"
    )


@dataclass(frozen=True)
class StoredSide:
    """The sequences of one side of one source, on the disk."""

    files: FlatFiles
    byte_files: FlatFiles | None
    """Bytes of text per token, or per sequence of conversations; None on the side of training, which needs none."""
    byte_counts: Array
    """``(256,)`` how often each byte value occurs in the side's text."""
    sequence_length: int
    """S, the number of tokens per sequence."""
    is_whole: bool
    """Whether sequences are stored as they are, as those of conversations, without a shared token."""

    def __len__(self) -> int:
        length = self.sequence_length
        if self.is_whole:
            return len(self.files) // (length + 1)
        # Neighbours share a token.
        return max(0, len(self.files) - 1) // length

    def tokens(self, index: int) -> Array:
        """Return the ``(S + 1,)`` token ids of a sequence."""
        length = self.sequence_length
        return self.files.read(index * (length + self.is_whole), length + 1)

    def num_bytes(self, index: int) -> int:
        """Return the bytes of text that the labels of a sequence encode; validation only."""
        assert self.byte_files is not None, "the bytes of training sequences are not stored"
        if self.is_whole:
            return int(self.byte_files.read(index, 1)[0])
        # The labels are the tokens of the sequence but the first.
        length = self.sequence_length
        return int(self.byte_files.read(index * length + 1, length).sum(dtype=np.int64))


@dataclass(frozen=True)
class SourceTable:
    """Both sides of one source."""

    train: StoredSide
    validation: StoredSide
    digest: str
    """Digest of all texts in order, independent of the place and times of the files."""
    conversations: dict[str, int] | None
    """Numbers of conversations, and of those that were cut and left out; None for text."""


class StoredFile(NamedTuple):
    """A file of a table as the manifest describes it."""

    path: str
    shard: str
    num_bytes: int
    checksum: str
    time: int
    """Time of the last change, in nanoseconds."""


def read_manifest(folder: Path, setting: str) -> dict[str, Any]:
    """Return the manifest of a complete table.

    Raises:
        DataError: it cannot be read, or its files have another layout.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = manifest["format"]
    except (OSError, ValueError, KeyError) as error:
        raise damaged(setting, f"{folder / MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if found != TABLE_FORMAT:
        raise damaged(setting, f"{folder / MANIFEST} has the format {found}, and this version reads {TABLE_FORMAT}")
    return manifest


def stored_files(folder: Path, manifest: dict[str, Any]) -> Iterator[StoredFile]:
    """Yield the files of a table."""
    for name, entries in manifest["files"].items():
        columns = (manifest["shards"], entries["num_bytes"], entries["checksums"], entries["times"])
        for shard, num_bytes, checksum, time in zip(*columns, strict=True):
            # As strings: there may be many thousands, and objects for paths take ten times as long.
            yield StoredFile(f"{folder}/{shard}/{name}", shard, num_bytes, checksum, time)


def open_table(folder: Path, sequence_length: int, setting: str) -> SourceTable:
    """Open a complete table for sequences of ``sequence_length`` tokens.

    Every file must have its size, and one that was changed since it was written its checksum.

    Raises:
        DataError: a file is missing or was changed, and is named.
    """
    manifest = read_manifest(folder, setting)
    if problems := find_damage(folder, manifest):
        raise damaged(setting, problems[0][1])
    is_whole = manifest["sequence_length"] is not None
    assert manifest["sequence_length"] in (None, sequence_length), "the length is part of the key of conversations"

    def files(name: str, dtype: np.dtype[Any]) -> FlatFiles:
        lengths = [num_bytes // dtype.itemsize for num_bytes in manifest["files"][name]["num_bytes"]]
        return FlatFiles([f"{folder}/{shard}/{name}" for shard in manifest["shards"]], lengths, dtype)

    def stored(side: Side) -> StoredSide:
        return StoredSide(
            files(tokens_file(side), np.dtype(manifest["dtype"])),
            files(VALIDATION_BYTES, BYTE_COUNTS_TYPE) if side == "validation" else None,
            np.array(manifest["byte_counts"][side], np.int64),
            sequence_length,
            is_whole,
        )

    return SourceTable(stored("train"), stored("validation"), manifest["digest"], manifest["conversations"])


VALIDATION_BYTES = "validation_bytes.bin"
"""Name of the file of a shard with the bytes of text of the validation tokens."""


def tokens_file(side: Side) -> str:
    """Return the name of the file of a shard with the tokens of one side."""
    return f"{side}.bin"


def find_damage(folder: Path, manifest: dict[str, Any], *, all_checksums: bool = False) -> list[tuple[str, str]]:
    """Return the shards that are not as they were written, with the problem of the first file of each.

    The checksum of a file is compared if the time of its last change is another than in the manifest, as it is for
    copied files: then the manifest gets the new times, so that this happens once.
    """
    problems: dict[str, str] = {}
    to_read = []
    for file in stored_files(folder, manifest):
        try:
            stat = os.stat(file.path)
        except FileNotFoundError:
            problems.setdefault(file.shard, f"{file.path} is missing")
            continue
        if stat.st_size != file.num_bytes:
            problems.setdefault(
                file.shard, f"{file.path} has {stat.st_size} bytes, and it was written with {file.num_bytes}"
            )
        elif all_checksums or stat.st_mtime_ns != file.time:
            to_read.append(file)
    if len(to_read) > 1 and not all_checksums:
        logger.info("%s: %d files were copied or changed; their checksums are compared", folder, len(to_read))
    # Hashing releases Python's lock, and a disk serves several readers.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for file, checksum in zip(to_read, pool.map(lambda file: file_checksum(file.path), to_read), strict=True):
            if checksum != file.checksum:
                problems.setdefault(file.shard, f"{file.path} was changed: its checksum is another")
    if to_read and not problems:
        _keep_times(folder, manifest)
    return list(problems.items())


def _keep_times(folder: Path, manifest: dict[str, Any]) -> None:
    for name, entries in manifest["files"].items():
        entries["times"] = [os.stat(folder / shard / name).st_mtime_ns for shard in manifest["shards"]]
    # A user who may only read the folder pays for the checksums every time.
    with suppress(OSError):
        write_json_atomically(folder / MANIFEST, manifest)


def file_checksum(path: str) -> str:
    """Return the checksum of a file, as the manifest has it."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json_atomically(path: Path, content: Any) -> None:
    """Write a JSON file that other processes find whole or not at all."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)


def damaged(setting: str, problem: str) -> DataError:
    """Return the error for a table whose files are not as they were written."""
    return DataError(
        f"data.cache_dir: the tokens of {setting} are damaged: {problem}; the files must be as they were written. "
        "`qsparse-moe prepare` with this config makes the damaged shards again"
    )
