"""A source that was found but not yet read, and the handling of its bad records."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qsparse_moe.config.schema import DataConfig
from qsparse_moe.data.chat import ChatSource, Encode
from qsparse_moe.data.conversations import messages_json
from qsparse_moe.data.local_files import missing_column, short, text_problem, too_long
from qsparse_moe.data.pieces import Part, Piece, divide
from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

# The digest covers a file whole up to this size, and evenly spaced blocks of a longer one: hashing a corpus of hundreds
# of GB in full would delay every start by minutes.
_SAMPLED_ABOVE = 8 << 20
_BLOCK_BYTES = 64 << 10
_NUM_BLOCKS = 64


@dataclass(frozen=True)
class Limits:
    """Limits for bad records and long documents, from ``data``."""

    max_bad_records: int = DataConfig.model_fields["max_bad_records"].default
    max_document_bytes: int = DataConfig.model_fields["max_document_bytes"].default


LIMITS = Limits()
"""The default limits."""


@dataclass(frozen=True)
class OpenSource:
    """A source that was found but not yet read."""

    setting: str
    """Its path in the config, and its kind, for messages."""
    dataset: IterableDataset | None
    """The stream of its records, with one shard per file; None where only parts are read."""
    column: str
    """The column of the stream that holds the text."""
    identity: dict[str, Any]
    """Identifies the content without reading it: the files with sizes and times, or the revision on the hub."""
    num_bytes: int | None
    """Total bytes of text; None if they are unknown before reading."""
    files: tuple[str, ...] = ()
    """The local files to read, in order; empty for a source on the hub."""
    limits: Limits = LIMITS
    """Its limits for bad records and long documents."""
    chat: ChatSource | None = None
    """How its records are read if they are conversations."""

    read_pieces: Callable[[Sequence[Piece]], Iterator[dict[str, str]]] | None = None
    """Reads the records of pieces of its files; None for a source that ``datasets`` opens as a whole."""
    cut_mark: bytes | None = None
    """What ends a document in its files, so that a large one may be cut there; None: they are not cut."""

    def parts(self, shard_bytes: int) -> list[Part]:
        """Return the parts that become its shards: a function of its content, not of the number of processes."""
        sizes = [os.path.getsize(file) for file in self.files]
        if self.read_pieces is None:
            assert self.dataset is not None, "a source without a reader of files is a stream"
            # The files of a data set on the hub are its parts: their sizes are not known.
            most = -(-sum(sizes) // shard_bytes) if sizes else self.dataset.num_shards
            count = 1 if self.chat is not None else min(self.dataset.num_shards, most)
            return [Part(sum(sizes) // count if sizes else None, stream=(index, count)) for index in range(count)]
        # Conversations are packed one after the other into sequences that stay open, so they become one shard.
        if self.chat is not None:
            return [Part(sum(sizes), tuple(map(Piece, self.files)))]
        return divide(self.files, shard_bytes, kind=self.identity["kind"], separator=self.cut_mark)

    def records(self, part: Part) -> Iterable[dict[str, Any]]:
        """Return the records of a part, in order."""
        if self.read_pieces is not None:
            return self.read_pieces(part.pieces)
        assert self.dataset is not None, "a source without a reader of files is a stream"
        index, count = part.stream
        return self.dataset if count == 1 else self.dataset.shard(count, index)

    def for_other_process(self) -> OpenSource:
        """Return the source in the form that another process needs to read its parts."""
        # The library datasets takes a second to import, and longer on a busy machine.
        return self if self.read_pieces is None else replace(self, dataset=None)

    def no_records(self) -> DataError:
        """Return the error for a source without any record."""
        return DataError(
            f"{self.setting}: every file of path is empty, and one must hold text; name files that do in path"
        )

    def encoder(self, tokenizer: TextTokenizer) -> Encode:
        """Return the function that tokenises its texts."""
        return tokenizer.tokenize if self.chat is None else self.chat.documents

    def texts(self, dataset: Iterable[dict[str, Any]] | None = None, bad: BadRecords | None = None) -> Iterator[str]:
        """Yield the documents in order, without empty ones; ``dataset`` may be a part of the stream or of the files.

        Those of a source of format chat are ``Conversation`` objects.

        Records that cannot be used are counted in ``bad``.

        Raises:
            DataError: more records than ``data.max_bad_records`` are not usable, or a file or the hub fails.
        """
        bad = bad or BadRecords(self.setting, self.limits)
        row = -1
        records = self.dataset if dataset is None else dataset
        assert records is not None, "a source for another process has only parts"
        try:
            for row, example in enumerate(records):
                text, problem = self._read(example, row)
                if problem:
                    bad.add(problem)
                elif text:
                    yield text
        except DataError:
            raise
        except Exception as error:  # the hub's readers raise whatever their formats and the network do
            raise DataError(
                f"{self.setting} could not be read to the end: {short(error)}; every row must be readable text. Try "
                "again if the network failed, else choose other data or a local copy (kind jsonl or parquet)"
            ) from error
        if dataset is None and row < 0:
            raise self.no_records()
        bad.end_pass()

    def _read(self, example: dict[str, Any], row: int) -> tuple[str, str]:
        """Return the text of a record and its problem; the readers of local files have already looked for it."""
        if example.get("problem"):
            return "", str(example["problem"])
        place = example.get("place") or f"{self.setting}, row {row} of the stream"
        if self.column not in example:
            return "", missing_column(list(example), self.column, place)
        value = example[self.column]
        if self.chat is None:
            return value, self._text_problem(value, place)
        if "place" not in example:
            value, problem = messages_json(value, self.column, place)
            if problem:
                return "", problem
        problem = self._text_problem(value, place)
        return ("", problem) if problem else self.chat.chat.read(value, place)

    def _text_problem(self, text: Any, place: str) -> str:
        max_bytes = self.limits.max_document_bytes
        problem = text_problem(text, self.column, place)
        # A character has at most 4 bytes, so that short texts need not be encoded to be measured.
        if not problem and 4 * len(text) > max_bytes and len(text.encode("utf-8")) > max_bytes:
            return too_long(place, max_bytes)
        return problem


class BadRecords:
    """Counts the unusable records of one pass over a source."""

    def __init__(self, setting: str, limits: Limits) -> None:
        self._setting, self._limit = setting, limits.max_bad_records
        self.count = 0

    def add(self, problem: str) -> None:
        """Count one more unusable record; the log names the first.

        Raises:
            DataError: there are more than may be skipped.
        """
        self.count += 1
        if self.count > self._limit:
            counted = f" ({self.count} bad records in this pass)" if self._limit else ""
            raise DataError(f"{problem}, or let data.max_bad_records ({self._limit}) skip such records{counted}")
        # One line for the first record, and the total at the end: a damaged file may hold millions of bad records.
        if self.count == 1:
            logger.warning("skipped a bad record (data.max_bad_records is %d): %s", self._limit, problem)

    def end_pass(self) -> None:
        """Log the number of skipped records, if any."""
        if self.count:
            logger.warning("%s: %d bad records skipped in this pass", self._setting, self.count)


def sizes_and_times(files: Sequence[str]) -> list[list[Any]]:
    """Return path, bytes and time of change of every file."""
    stats = [os.stat(file) for file in files]
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]


def content_digest(files: Sequence[str]) -> str:
    """Return a digest of the files' contents in order, the same wherever they lie and whenever they were written.

    A file above 8 MiB contributes its size and 64 evenly spaced blocks of 64 KiB.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = os.path.getsize(file)
        # Without the size, bytes moved from the end of one file to the start of the next would not change the digest.
        digest.update(size.to_bytes(8, "big"))
        with open(file, "rb") as stream:
            if size <= _SAMPLED_ABOVE:
                digest.update(stream.read())
                continue
            for block in range(_NUM_BLOCKS):
                # The first and the last block are the ends of the file.
                stream.seek((size - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
