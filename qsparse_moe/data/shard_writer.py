"""Write one shard: the tokens of one part of a source, of both sides, with what the manifest needs of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from qsparse_moe.data.conversations import Conversation
from qsparse_moe.data.open_source import BadRecords, OpenSource
from qsparse_moe.data.packing import Array, PackedSequences, Packer, is_validation, text_digest
from qsparse_moe.data.packing_settings import Packing
from qsparse_moe.data.pieces import Part
from qsparse_moe.data.stored import BYTE_COUNTS_TYPE, SIDES, VALIDATION_BYTES, Side, tokens_file

SUMMARY = "shard.json"
"""Name of the file with the counts and checksums of a shard."""
DIGESTS = "digests.bin"
"""Name of the file with the digests of a shard's documents, in order."""

# Text tokenised at once: enough to occupy all threads of a tokenizer, and little compared with a process's memory.
_CHUNK_BYTES = 4 << 20


def write_shard(
    source: OpenSource,
    part: Part,
    packing: Packing,
    folder: Path,
    *,
    max_bytes: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the shard of ``part`` into an empty folder.

    Args:
        source: the source.
        part: one of its parts.
        packing: the tokenizer, and what else the tokens depend on.
        folder: the folder.
        max_bytes: bytes of text at which the shard ends.
        report: called with the bytes of text that are done.

    Raises:
        DataError: a record or the source cannot be read, or the text cannot be tokenised.
    """
    bad = BadRecords(source.setting, source.limits)
    records = _Counted(source.records(part))
    done = 0
    side_of: dict[bool, Side] = {False: "train", True: "validation"}
    with _Files(folder) as files:
        writers = {side: side_writer(source, packing, files, side) for side in SIDES}
        limited = UpTo(source.texts(records, bad), max_bytes)
        for texts in _chunks(limited):
            encoded = [text.encode("utf-8") for text in texts]
            digests = [text_digest(text) for text in encoded]
            sides = [side_of[is_validation(digest, packing.validation_fraction)] for digest in digests]
            for side in SIDES:
                writers[side].add([text for text, its_side in zip(texts, sides, strict=True) if its_side == side])
            files.write(DIGESTS, np.frombuffer(b"".join(digests), np.uint8))
            done += sum(map(len, encoded))
            report(done)
        summary: dict[str, Any] = {
            "byte_counts": {side: writer.close() for side, writer in writers.items()},
            "records": records.count,
            "bad_records": bad.count,
            "text_bytes": done,
            "is_full": limited.is_full,
            "conversations": source.chat.counts.as_dict() if source.chat is not None else None,
        }
        if source.chat is not None:
            source.chat.log_pass(source.setting)
        (folder / SUMMARY).write_text(json.dumps(summary | {"files": files.close()}), encoding="utf-8")


class _Counted:
    """Counts the records that are read."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self._records = records
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for record in self._records:
            self.count += 1
            yield record


class _Files:
    """The files of a shard, with a running checksum of each."""

    def __init__(self, folder: Path) -> None:
        names = (*map(tokens_file, SIDES), VALIDATION_BYTES, DIGESTS)
        self._open = ExitStack()
        self._streams = {
            name: self._open.enter_context(io.BufferedWriter(io.FileIO(folder / name, "wb"))) for name in names
        }
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in names}

    def write(self, name: str, values: Array) -> None:
        """Append values."""
        content = np.ascontiguousarray(values).data.cast("B") if values.size else b""
        self._digests[name].update(content)
        self._streams[name].write(content)

    def close(self) -> dict[str, dict[str, Any]]:
        """Close the files, and return the size and checksum of each."""
        sizes = {name: stream.tell() for name, stream in self._streams.items()}
        # Here and not only at the end of the block, so that a full disk is noticed before the summary is written.
        self._open.close()
        return {name: {"num_bytes": sizes[name], "checksum": self._digests[name].hexdigest()} for name in sizes}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


class SideWriter(Protocol):
    """Writes the tokens of one side of a shard."""

    def add(self, texts: Sequence[str]) -> None:
        """Write the tokens of documents."""

    def close(self) -> list[int]:
        """Write what is still to be written, and return how often each byte value occurs in the text."""


def side_writer(source: OpenSource, packing: Packing, files: _Files, side: Side) -> SideWriter:
    """Return the writer of one side of a shard."""
    dtype = token_type(source, packing)
    return (_TextWriter if source.chat is None else _ChatWriter)(source, packing, files, side, dtype)


def token_type(source: OpenSource, packing: Packing) -> np.dtype[Any]:
    """Return the type of the stored tokens."""
    # 16 bits halve the disk space and page cache of every vocabulary of up to 65536 tokens. The marks in the tokens of
    # conversations take more.
    fits = packing.tokenizer.vocab_size <= 1 << 16 and source.chat is None
    return np.dtype("<u2" if fits else "<u4")


class _Writer:
    def __init__(self, source: OpenSource, packing: Packing, files: _Files, side: Side, dtype: np.dtype[Any]) -> None:
        self._source, self._packing, self._files, self._side, self._dtype = source, packing, files, side, dtype
        self._byte_counts = np.zeros(256, np.int64)

    def close(self) -> list[int]:
        counts: list[int] = self._byte_counts.tolist()
        return counts

    def _write_tokens(self, tokens: Array) -> None:
        self._files.write(tokens_file(self._side), tokens.astype(self._dtype))

    def _write_bytes(self, num_bytes: Array) -> None:
        if self._side == "validation":
            self._files.write(VALIDATION_BYTES, num_bytes.astype(BYTE_COUNTS_TYPE))


class _TextWriter(_Writer):
    """Writes tokens one after the other; the sequences are cut when they are read."""

    def add(self, texts: Sequence[str]) -> None:
        self._byte_counts += count_bytes(texts)
        if not texts:
            return
        tokenizer = self._packing.tokenizer
        # The bytes of each token take longer than its id, and only the loss of validation is counted in bytes.
        if self._side == "train":
            self._write_tokens(np.concatenate(tokenizer.token_ids(texts)))
            return
        documents = tokenizer.tokenize(texts)
        self._write_tokens(np.concatenate([document.tokens for document in documents]))
        self._write_bytes(np.concatenate([document.num_bytes for document in documents]))


class _ChatWriter(_Writer):
    """Writes sequences of whole conversations."""

    def __init__(self, source: OpenSource, packing: Packing, *others: Any) -> None:
        super().__init__(source, packing, *others)
        self._encode = source.encoder(packing.tokenizer)
        self._packer = Packer(packing.sequence_length)

    def add(self, texts: Sequence[str]) -> None:
        self._byte_counts += count_bytes(texts)
        self._write(self._packer.add(self._encode(texts) if texts else []))

    def close(self) -> list[int]:
        self._write(self._packer.finish())
        return super().close()

    def _write(self, sequences: PackedSequences) -> None:
        self._write_tokens(sequences.tokens)
        self._write_bytes(sequences.num_bytes)


def count_bytes(texts: Sequence[str]) -> Array:
    """``(256,)`` how often each byte value occurs in the texts, and in those of conversations that are targets."""
    counted = "".join(text.counted if isinstance(text, Conversation) else text for text in texts)
    return np.bincount(np.frombuffer(counted.encode("utf-8"), np.uint8), minlength=256)


class UpTo:
    """Texts up to ``max_bytes`` of UTF-8; the last one is cut between two characters."""

    def __init__(self, texts: Iterator[str], max_bytes: int | None) -> None:
        self._texts, self._left = texts, max_bytes
        self.is_full = False
        """Whether the limit ended the texts, even if the character that it cuts leaves some bytes free."""

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self._left is None:
                yield text
                continue
            encoded = text.encode("utf-8")
            # A part of a conversation is none.
            if isinstance(text, Conversation) and len(encoded) > self._left:
                self.is_full = True
                return
            if len(encoded) >= self._left and not isinstance(text, Conversation):
                self.is_full = True
                # errors="ignore" drops the bytes of a character that the limit cuts through.
                if cut := encoded[: self._left].decode("utf-8", errors="ignore"):
                    yield cut
                return
            self._left -= len(encoded)
            yield text


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        # Characters are close enough to bytes here, and cost no encoding.
        size += len(text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
