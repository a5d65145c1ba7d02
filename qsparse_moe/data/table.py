"""One source, tokenised and packed once into memory-mapped Arrow tables: one for training, one for validation."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qsparse_moe.data.cache import build_once
from qsparse_moe.data.conversations import Conversation
from qsparse_moe.data.open_source import LIMITS, BadRecords, OpenSource
from qsparse_moe.data.packing import PACKING_VERSION, Array, PackedSequences, Packer, is_validation, text_digest
from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.errors import DataError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called while tables are built with the source, the bytes of text done, and the total bytes if known."""

Side = Literal["train", "validation"]
SIDES: tuple[Side, ...] = ("train", "validation")

Checks = Callable[[dict[Side, int]], None]
"""Called with the number of sequences of each side before a table enters the cache."""

TABLES = "tables"
"""Folder of tables in the cache."""
_SUMMARY = "table.json"

# Text tokenised at once: enough to occupy all threads of a tokenizer, and little compared with a process's memory.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Packing:
    """Everything other than the text on which the sequences depend."""

    tokenizer: TextTokenizer
    sequence_length: int
    """S, the number of tokens per sequence."""
    validation_fraction: float
    """Fraction of the documents held out."""

    def describe(self) -> dict[str, Any]:
        """Return a JSON-able description that is equal exactly where the same text gives the same sequences."""
        return {
            "version": PACKING_VERSION,
            "tokenizer": self.tokenizer.fingerprint,
            "sequence_length": self.sequence_length,
            "validation_fraction": self.validation_fraction,
        }


@dataclass(frozen=True)
class SideTable:
    """The sequences of one side of one source."""

    chunks: tuple[Array, ...]
    """``(n, S + 1)`` token ids each, views of the mapped file."""
    num_bytes: Array
    """``(R,)`` bytes of text that each sequence's labels encode."""
    byte_counts: Array
    """``(256,)`` how often each byte value occurs in the side's text."""

    def __len__(self) -> int:
        return len(self.num_bytes)


@dataclass(frozen=True)
class SourceTable:
    """Both sides of one source."""

    train: SideTable
    validation: SideTable
    digest: str
    """Digest of all texts in order, independent of the place and times of the files."""
    conversations: dict[str, int] | None
    """Numbers of conversations, and of those that were cut and left out; None for text."""


def load_source_table(
    source: OpenSource,
    packing: Packing,
    cache_dir: Path,
    *,
    max_bytes: int | None = None,
    progress: Progress | None = None,
    checks: Checks | None = None,
) -> SourceTable:
    """Return the table of a source; build it first if the cache has none for exactly this text and packing.

    ``checks`` is called with the number of sequences of each side and may raise, so that no table is cached that no run
    can use.

    Raises:
        DataError: the source cannot be read, the cache cannot be written, or a table in it is damaged.
    """
    key = {"packing": packing.describe(), "source": source.identity, "max_bytes": max_bytes}
    if source.chat is not None:
        key["chat"] = source.chat.chat.describe()
    # Only where it differs from the default: caches of versions without the setting stay valid.
    if source.limits.max_document_bytes != LIMITS.max_document_bytes:
        key["max_document_bytes"] = source.limits.max_document_bytes
    folder = cache_dir / TABLES / _key(key)
    build_once(folder, lambda partial: _build(source, packing, partial, max_bytes, progress, checks=checks))
    try:
        summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        # The cached table may have been built under a higher limit than this run's.
        _check_bad_records(source, summary)
        return _open(folder, summary, packing.sequence_length)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data.cache_dir: the table of {source.setting} in {folder} is damaged ({type(error).__name__}: {error}), "
            "and its files must be as they were written; remove that folder, and it is built again"
        ) from error


def _key(description: dict[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _check_bad_records(source: OpenSource, summary: dict[str, Any]) -> None:
    skipped, limit = summary.get("bad_records", 0), source.limits.max_bad_records
    if skipped > limit:
        raise DataError(
            f"{source.setting}: {skipped} bad records were skipped when its table was made, and "
            f"data.max_bad_records is {limit}; correct these records, or set data.max_bad_records={skipped} or more"
        )


def _build(
    source: OpenSource,
    packing: Packing,
    folder: Path,
    max_bytes: int | None,
    progress: Progress | None,
    *,
    checks: Checks | None,
) -> None:
    began = time.monotonic()
    bad = BadRecords(source.setting, source.limits)
    progress = progress or _LogProgress()
    writers = {side: _SideWriter(folder, side, packing, source) for side in SIDES}
    digest = hashlib.blake2b(digest_size=16)
    total = _smaller(source.num_bytes, max_bytes)
    done = 0
    for texts in _chunks(_up_to(source.texts(bad=bad), max_bytes)):
        encoded = [text.encode("utf-8") for text in texts]
        digests = [text_digest(text) for text in encoded]
        for side in SIDES:
            held_out = side == "validation"
            chosen = [i for i, d in enumerate(digests) if is_validation(d, packing.validation_fraction) == held_out]
            writers[side].add([texts[i] for i in chosen])
        # The digests are hashed in place of the texts, so that no text is hashed twice.
        digest.update(b"".join(digests))
        done += sum(map(len, encoded))
        progress(source.setting, done, total)
    summary: dict[str, Any] = {side: writer.close() for side, writer in writers.items()}
    # May raise, and then nothing of this table enters the cache.
    if checks is not None:
        checks({side: writer.num_sequences for side, writer in writers.items()})
    summary |= {"digest": digest.hexdigest(), "bad_records": bad.count}
    if source.chat is not None:
        summary["conversations"] = source.chat.counts.as_dict()
        source.chat.log_pass(source.setting)
    (folder / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    sequences = ", ".join(f"{writer.num_sequences} {side}" for side, writer in writers.items())
    logger.info(
        "%s: %d bytes packed into %s sequences in %.1f s", source.setting, done, sequences, time.monotonic() - began
    )


class _LogProgress:
    """Logs a line every few seconds; a short build logs its end only."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every = every_seconds
        self._logged_at = time.monotonic()

    def __call__(self, setting: str, done: int, total: int | None) -> None:
        if time.monotonic() - self._logged_at < self._every:
            return
        self._logged_at = time.monotonic()
        of_all = f" of {total / 1e6:,.0f} ({100 * done / total:.0f} %)" if total else ""
        logger.info("%s: %.0f%s million bytes tokenised", setting, done / 1e6, of_all)


def _smaller(size: int | None, limit: int | None) -> int | None:
    known = [value for value in (size, limit) if value is not None]
    # A source of unknown size may end before the limit, so the limit alone is no total.
    return min(known) if size is not None else None


def _up_to(texts: Iterator[str], max_bytes: int | None) -> Iterator[str]:
    """Yield the texts up to ``max_bytes`` of UTF-8; the last one is cut between two characters."""
    left = max_bytes
    for text in texts:
        if left is None:
            yield text
            continue
        encoded = text.encode("utf-8")
        # A part of a conversation is none.
        if isinstance(text, Conversation) and len(encoded) > left:
            return
        # errors="ignore" drops the bytes of a character that the limit cuts through.
        if len(encoded) >= left and not isinstance(text, Conversation):
            if cut := encoded[:left].decode("utf-8", errors="ignore"):
                yield cut
            return
        left -= len(encoded)
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


class _SideWriter:
    """Writes the sequences of one side to an Arrow file, which ``datasets`` maps."""

    def __init__(self, folder: Path, side: Side, packing: Packing, source: OpenSource) -> None:
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        self._encode = source.encoder(packing.tokenizer)
        self._packer = Packer(packing.sequence_length)
        # 16 bits halve the disk space and page cache of every vocabulary of up to 65536 tokens. The marks in the tokens
        # of conversations take more.
        fits = packing.tokenizer.vocab_size <= 1 << 16 and source.chat is None
        self._dtype = np.dtype(np.uint16 if fits else np.uint32)
        tokens = List(Value(self._dtype.name), length=packing.sequence_length + 1)
        features = Features({"tokens": tokens, "num_bytes": Value("int64")})
        self._schema = features.arrow_schema
        self._writer = ArrowWriter(path=str(folder / f"{side}.arrow"), features=features)
        self._byte_counts = np.zeros(256, np.int64)
        self.num_sequences = 0

    def add(self, texts: Sequence[str]) -> None:
        """Write every sequence that is full after these documents."""
        self._write(self._packer.add(self._encode(texts) if texts else []))
        self._byte_counts += count_bytes(texts)

    def _write(self, sequences: PackedSequences) -> None:
        import pyarrow as pa

        if not len(sequences.tokens):
            return
        flat = pa.array(np.ascontiguousarray(sequences.tokens, self._dtype).reshape(-1))
        tokens = pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field("tokens").type)
        table = pa.Table.from_arrays([tokens, pa.array(sequences.num_bytes)], schema=self._schema)
        # One record batch per call, because opening the table reads the header of every record batch.
        self._writer.write_table(table, writer_batch_size=len(sequences.tokens))
        self.num_sequences += len(sequences.tokens)

    def close(self) -> dict[str, Any]:
        """Write the sequences that are not full, finish the file, and return this side's part of the summary."""
        self._write(self._packer.finish())
        self._writer.finalize()
        # The key is that of every table in a cache.
        return {"num_rows": self.num_sequences, "byte_counts": self._byte_counts.tolist()}


def count_bytes(texts: Sequence[str]) -> Array:
    """``(256,)`` how often each byte value occurs in the texts, and in those of conversations that are targets."""
    counted = "".join(text.counted if isinstance(text, Conversation) else text for text in texts)
    return np.bincount(np.frombuffer(counted.encode("utf-8"), np.uint8), minlength=256)


def _open(folder: Path, summary: dict[str, Any], sequence_length: int) -> SourceTable:
    train, validation = (_open_side(folder / f"{side}.arrow", summary[side], sequence_length) for side in SIDES)
    return SourceTable(train, validation, summary["digest"], summary.get("conversations"))


def _open_side(path: Path, summary: dict[str, Any], sequence_length: int) -> SideTable:
    from datasets import Dataset

    data = Dataset.from_file(str(path)).data
    # Zero-copy views: they keep the mapping alive, and pages are read when sequences are. Anything else would copy the
    # table into memory, so it is an error.
    chunks = tuple(
        chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, sequence_length + 1)
        for chunk in data.column("tokens").chunks
    )
    num_bytes = data.column("num_bytes").to_numpy()
    if len(num_bytes) != summary["num_rows"] or sum(map(len, chunks)) != summary["num_rows"]:
        raise ValueError(f"{path.name} holds {len(num_bytes)} sequences, not {summary['num_rows']}")
    return SideTable(chunks, num_bytes, np.array(summary["byte_counts"], np.int64))


def too_little_train(source: OpenSource, packing: Packing) -> DataError:
    """Return the error for a source whose training documents do not fill one sequence."""
    return DataError(
        f"{source.setting} has too little text for one training sequence: the documents that are not held out have "
        f"fewer than data.sequence_length + 1 = {packing.sequence_length + 1} tokens, and every source must have "
        "them; add documents, raise max_bytes where it is set, or shorten data.sequence_length"
    )


def too_little_validation(sources: Sequence[OpenSource], packing: Packing) -> DataError:
    """Return the error for sources whose held-out documents together do not fill one sequence."""
    return DataError(
        f"{', '.join(source.setting for source in sources)}: too little text for one validation sequence: the "
        f"documents held out with data.validation_fraction {packing.validation_fraction} have fewer than "
        f"data.sequence_length + 1 = {packing.sequence_length + 1} tokens. A document (a text file, or a row of the "
        "others) is never split between the sides; add documents, name the separator of the documents in a file, "
        "raise data.validation_fraction, or shorten data.sequence_length"
    )
