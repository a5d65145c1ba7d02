"""The division of local files into shards: whole files together, and large files in pieces that begin with a document.

The division depends on the files and ``data.shard_bytes`` only. Pieces are cut where a document begins, so the
documents of all pieces are those of the files, in order.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A file, or the part of one whose documents begin between two places."""

    file: str
    begin: int = 0
    """Byte from which on documents belong to it; of a Parquet file the first row group."""
    end: int | None = None
    """Byte from which on documents belong to the next piece, or the row group; None: the end of the file."""

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole file."""
        return not self.begin and self.end is None


@dataclass(frozen=True)
class Part:
    """The part of a source that becomes one shard: pieces of local files, or a part of the stream of a data set."""

    size: int | None
    """Bytes in the files; None if they are unknown."""
    pieces: tuple[Piece, ...] = ()
    stream: tuple[int, int] = (0, 1)
    """Without pieces: the index of the part, and the number of parts of equal size."""


def divide(files: Sequence[str], shard_bytes: int, *, kind: str, separator: bytes | None) -> list[Part]:
    """Return the parts of a source of local files, of about ``shard_bytes`` each.

    Args:
        files: the files in order.
        shard_bytes: the size above which a file is cut, if it can be.
        kind: kind of the source.
        separator: what ends a document in a file; None: the files cannot be cut there.
    """
    parts: list[Part] = []
    pieces: list[Piece] = []
    size = 0
    for piece, piece_size in _pieces(files, shard_bytes, kind, separator):
        if pieces and size + piece_size > shard_bytes:
            parts.append(Part(size, tuple(pieces)))
            pieces, size = [], 0
        pieces.append(piece)
        size += piece_size
    return [*parts, Part(size, tuple(pieces))]


def _pieces(files: Sequence[str], shard_bytes: int, kind: str, separator: bytes | None) -> Iterator[tuple[Piece, int]]:
    for file in files:
        size = os.path.getsize(file)
        if size > shard_bytes and kind == "parquet":
            yield from _row_groups(file, size, shard_bytes)
        elif size > shard_bytes and separator is not None and not is_compressed(file):
            for begin in range(0, size, shard_bytes):
                end = begin + shard_bytes
                yield Piece(file, begin, None if end >= size else end), min(size, end) - begin
        else:
            yield Piece(file), size


def _row_groups(file: str, size: int, shard_bytes: int) -> Iterator[tuple[Piece, int]]:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except (OSError, ValueError):
        # The reader of the file raises the same error, and names the file in it.
        yield Piece(file), size
        return
    sizes = [metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)]
    # Row groups count by their part of the file, because their own sizes are those before compression.
    scale = size / max(1, sum(sizes))
    begin, taken = 0, 0.0
    for index, group in enumerate(sizes):
        taken += group * scale
        if taken >= shard_bytes and index + 1 < len(sizes):
            yield Piece(file, begin, index + 1), round(taken)
            begin, taken = index + 1, 0.0
    yield Piece(file, begin), round(taken)


def is_compressed(file: str) -> bool:
    """Return whether the file is compressed with gzip, by its first bytes."""
    with open(file, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def open_piece(piece: Piece, separator: bytes, skip: bytes) -> tuple[IO[bytes], int]:
    """Open a piece of a file that is not compressed, and return it with its first byte's place in the file.

    Args:
        piece: a part of a file.
        separator: what ends a document.
        skip: a mark that the file may begin with, which is left out.
    """
    begin, end = (
        document_start(piece.file, place, separator)
        for place in (piece.begin, piece.end or os.path.getsize(piece.file))
    )
    stream = io.FileIO(piece.file)
    if not begin and stream.read(len(skip)) == skip:
        begin = len(skip)
    stream.seek(begin)
    return io.BufferedReader(_UpTo(stream, end)), begin  # type: ignore[type-var]


def document_start(file: str, place: int, separator: bytes) -> int:
    """Return where the first document begins whose separator before it lies at ``place`` or behind it.

    It is 0 for place 0 and the size of the file if there is no such separator.
    """
    if not place:
        return 0
    size = len(separator)
    # Separators that overlap, as in three line ends of which two are a separator, are found from left to right. Where
    # none begins less than a separator's length before another one, that one is found whatever comes before.
    start, last = max(0, place - size + 1), None
    with open(file, "rb") as stream:
        stream.seek(start)
        text = stream.read(_BLOCK_BYTES)
        while True:
            at = text.find(separator)
            while at >= 0:
                found = start + at
                if found >= place and (last is None or found - last >= size):
                    return found + size
                last = found
                at = text.find(separator, at + 1)
            block = stream.read(_BLOCK_BYTES)
            if not block:
                return start + len(text)
            # A separator may begin in the last bytes.
            kept = min(len(text), size - 1)
            start += len(text) - kept
            text = text[len(text) - kept :] + block


class _UpTo(io.RawIOBase):
    """A file up to some byte."""

    def __init__(self, stream: io.FileIO, end: int) -> None:
        self._stream, self._end = stream, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        block = self._stream.read(min(len(buffer), self._end - self._stream.tell()))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()
