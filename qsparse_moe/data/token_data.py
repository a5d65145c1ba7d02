"""All text of a run as packed sequences, read from tables or from streams."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qsparse_moe.config.schema import DataConfig
from qsparse_moe.data.batch import Batch
from qsparse_moe.data.chat import Chat, open_chat
from qsparse_moe.data.open_source import Limits, OpenSource, content_digest
from qsparse_moe.data.packing import Array
from qsparse_moe.data.packing_settings import Packing, too_little_train, too_little_validation
from qsparse_moe.data.prepare import Progress, build_here, build_in_processes
from qsparse_moe.data.sequences import SequenceTable, evenly_spaced_indices
from qsparse_moe.data.sources import open_source
from qsparse_moe.data.stored import StoredSide, read_manifest
from qsparse_moe.data.streaming import PartStreams, Streams
from qsparse_moe.data.table import TableJob, remove_damaged
from qsparse_moe.data.tokenizer import TextTokenizer, load_tokenizer
from qsparse_moe.errors import ConfigError

# Validation sequences that a stream gathers at the start, when the number needed is not known yet. By default this will
# be enough (training.evaluation_rows).
_FIRST_STREAM_SEQUENCES = 64


class TokenData:
    """The packed sequences of a run and a description of their origin; made by ``load_data``."""

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        parts: dict[str, str],
        train: SequenceTable | None,
        validation: SequenceTable,
        train_byte_counts: Array,
        streams: Streams | None = None,
        earlier_parts: dict[str, str] | None = None,
        chat: Chat | None = None,
        conversations: dict[str, dict[str, int]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = None if chat is None else chat.template
        """The template that wrote the conversations; None if no source holds any."""
        self.conversations = conversations
        """Numbers of conversations by source, and of those that were cut and left out, in table mode; else None."""
        self.parts = parts
        """Everything on which the sequences depend, by setting, with a digest of the content of each source."""
        self.earlier_parts = parts if earlier_parts is None else earlier_parts
        """``parts`` in the form of earlier versions' checkpoints: a stream by its files' names, sizes and times."""
        self.validation = validation
        """Validation sequences; in streaming mode a first few of them."""
        self._train = train
        self._train_byte_counts = train_byte_counts
        self._streams = streams
        self._gathered = {_FIRST_STREAM_SEQUENCES: validation}

    @property
    def train(self) -> SequenceTable:
        """Training sequences, in table mode."""
        assert self._train is not None, "in streaming mode training sequences come from TrainLoader only"
        return self._train

    @property
    def fingerprint(self) -> str:
        """Changes whenever the sequences do."""
        return fingerprint_of(self.parts)

    def unigram_bits_per_byte(self) -> float:
        """Bits per byte of validation text under the byte frequencies of train text, each counted once more.

        A model that does not reach a lower value has learnt no more than frequencies. In streaming mode
        the text is the part that was read while the first validation sequences were gathered.
        """
        # Every count is raised by one, so that a byte that occurs in the validation text only has a finite code length.
        frequencies = (self._train_byte_counts + 1) / (self._train_byte_counts + 1).sum()
        counts = self.validation.byte_counts
        return float(-(counts * np.log2(frequencies)).sum() / counts.sum())

    def evaluation_sequences(self, num_sequences: int) -> tuple[SequenceTable, Array]:
        """Return a table and the indices of ``num_sequences`` of its validation sequences at even distances.

        There are fewer indices where there are fewer sequences; they are the same for the same ``num_sequences``.
        """
        table = self.validation
        if self._streams is not None:
            # Once per number, because a stream is read from its beginning for it.
            if num_sequences not in self._gathered:
                self._gathered[num_sequences] = self._streams.validation(num_sequences).table
            table = self._gathered[num_sequences]
        return table, evenly_spaced_indices(num_sequences, len(table))

    def batch(self, tokens: Array) -> Batch:
        """Return the token ids ``(B, S + 1)`` of a table or a stream as a batch."""
        return self.validation.batch(tokens)

    def open_stream(self, parts: range, *, num_parts: int, seed: int | None) -> PartStreams | None:
        """Return some parts of the training text as a stream, from the beginning; None in table mode."""
        if self._streams is None:
            return None
        return self._streams.train(parts, num_parts=num_parts, seed=seed)


def load_data(config: DataConfig, *, progress: Progress | None = None) -> TokenData:
    """Open the data of a run; in table mode, tokenise the sources that the cache does not hold yet.

    Every rank may call it: each builds shards that are missing, and waits for those of the others.

    Args:
        config: the ``data`` section.
        progress: called while a table is built, in the process that builds it.

    Raises:
        DataError: a source, the tokenizer or the cache cannot be used, or there is too little text for one sequence.
        ConfigError: a setting is not allowed in ``data.mode``.
    """
    _check_mode(config)
    opened = _open_sources(config)
    if config.mode == "streaming":
        return _load_streams(config, opened)
    for job in opened.jobs:
        if not job.is_complete:
            build_here(job, progress)
    return _load_tables(config, opened)


@dataclass(frozen=True)
class PreparedSource:
    """A source whose tokens are in the cache."""

    setting: str
    folder: Path
    num_shards: int
    num_built: int
    """Number of shards that were built now; the others were there before."""
    repaired: list[str]
    """The problem of every shard that was found damaged and built again."""
    text_bytes: int
    """Bytes of text."""
    tokens: dict[str, int]
    """Number of tokens of each side."""
    seconds: float


def prepare_data(
    config: DataConfig, *, processes: int, verify: bool, progress: Progress
) -> tuple[TokenData, list[PreparedSource]]:
    """Tokenise what the cache does not hold yet in ``processes`` processes, build damaged shards again, and open all.

    ``verify`` compares the checksum of every file that was there before.

    Raises:
        ConfigError: ``data.mode`` is streaming.
        DataError: as ``load_data`` does.
    """
    if config.mode == "streaming":
        raise ConfigError(
            "data.mode (streaming) tokenizes while a run trains, and prepare makes tables before it; set "
            "data.mode=table, or start the run without prepare"
        )
    opened = _open_sources(config)
    prepared = [_prepare(job, processes, verify, progress) for job in opened.jobs]
    return _load_tables(config, opened), prepared


def _prepare(job: TableJob, processes: int, verify: bool, progress: Progress) -> PreparedSource:
    began = time.monotonic()
    repaired = remove_damaged(job, all_checksums=verify)
    there = sum(job.shard(number).exists() for number in range(len(job.parts)))
    if not job.is_complete:
        build_in_processes(job, processes, progress)
    manifest = read_manifest(job.folder, job.source.setting)
    return PreparedSource(
        setting=job.source.setting,
        folder=job.folder,
        num_shards=len(manifest["shards"]),
        num_built=len(manifest["shards"]) - there,
        repaired=repaired,
        text_bytes=manifest["text_bytes"],
        tokens=manifest["tokens"],
        seconds=time.monotonic() - began,
    )


class _Opened(NamedTuple):
    """The sources of a run before they are read."""

    packing: Packing
    chat: Chat | None
    sources: tuple[OpenSource, ...]
    jobs: tuple[TableJob, ...]


def _open_sources(config: DataConfig) -> _Opened:
    packing = Packing(load_tokenizer(config.tokenizer), config.sequence_length, config.validation_fraction)
    limits = Limits(config.max_bad_records, config.max_document_bytes)
    chat = open_chat(config, packing.tokenizer)
    sources = tuple(open_source(source, index, limits, chat=chat) for index, source in enumerate(config.sources))
    cache_dir = Path(config.cache_dir).expanduser()
    jobs = tuple(
        TableJob(source, packing, cache_dir, config.shard_bytes, settings.max_bytes)
        for source, settings in zip(sources, config.sources, strict=True)
    )
    return _Opened(packing, chat, sources, jobs)


def fingerprint_of(parts: dict[str, str]) -> str:
    """Return one digest of everything on which the sequences depend."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode("utf-8"), digest_size=16).hexdigest()


def _check_mode(config: DataConfig) -> None:
    for index, source in enumerate(config.sources):
        if config.mode == "streaming" and source.max_bytes is not None:
            raise ConfigError(
                f"data.sources.{index}.max_bytes ({source.max_bytes}) must be null when data.mode is streaming, where "
                "every rank reads its own part of a source in its own order; name fewer files, or use data.mode=table"
            )


def _load_tables(config: DataConfig, opened: _Opened) -> TokenData:
    packing, chat, sources, jobs = opened
    tables = [job.open() for job in jobs]
    for source, table in zip(sources, tables, strict=True):
        if not len(table.train):
            raise too_little_train(source, packing)
    # Of several sources, one may hold out nothing if another does.
    if not any(len(table.validation) for table in tables):
        raise too_little_validation(sources, packing)
    train = _mixed(config, packing, [table.train for table in tables])
    return TokenData(
        tokenizer=packing.tokenizer,
        parts=_parts(config, packing, chat, [table.digest for table in tables]),
        train=train,
        validation=_mixed(config, packing, [table.validation for table in tables]),
        train_byte_counts=train.byte_counts,
        chat=chat,
        conversations=None
        if chat is None
        else {
            f"data.sources.{index}": table.conversations
            for index, table in enumerate(tables)
            if table.conversations is not None
        },
    )


def _mixed(config: DataConfig, packing: Packing, tables: Sequence[StoredSide]) -> SequenceTable:
    return SequenceTable(
        tables,
        [source.weight for source in config.sources],
        document_token=packing.tokenizer.document_token,
        attend_across_documents=config.attend_across_documents,
    )


def open_streams(config: DataConfig) -> Streams:
    """Open the sources of a run in streaming mode, without reading the validation text.

    Raises:
        DataError: a source or the tokenizer cannot be used.
    """
    return _streams_of(config, _open_sources(config))


def _streams_of(config: DataConfig, opened: _Opened) -> Streams:
    weights = tuple(source.weight for source in config.sources)
    return Streams(
        opened.sources,
        weights,
        opened.packing,
        config.attend_across_documents,
        config.shuffle_window,
        config.validation_tokens,
    )


def _load_streams(config: DataConfig, opened: _Opened) -> TokenData:
    packing, chat, sources, _ = opened
    streams = _streams_of(config, opened)
    first = streams.validation(_FIRST_STREAM_SEQUENCES)
    return TokenData(
        tokenizer=packing.tokenizer,
        parts=_parts(config, packing, chat, [_stream_digest(source) for source in sources]),
        earlier_parts=_parts(config, packing, chat, [_identity_digest(source) for source in sources]),
        chat=chat,
        train=None,
        validation=first.table,
        train_byte_counts=first.train_byte_counts,
        streams=streams,
    )


def _parts(config: DataConfig, packing: Packing, chat: Chat | None, digests: Sequence[str]) -> dict[str, str]:
    parts = {
        "data.mode": config.mode,
        "data.sequence_length": str(config.sequence_length),
        "data.tokenizer": packing.tokenizer.fingerprint,
        "data.validation_fraction": str(config.validation_fraction),
    }
    if config.validation_tokens is not None:
        del parts["data.validation_fraction"]
        parts["data.validation_tokens"] = str(config.validation_tokens)
    for index, (source, digest) in enumerate(zip(config.sources, digests, strict=True)):
        parts |= {f"data.sources.{index}": digest, f"data.sources.{index}.weight": str(source.weight)}
    if chat is not None:
        parts |= {f"data.chat.{name}": str(value) for name, value in chat.describe().items()}
    return parts


def _stream_digest(source: OpenSource) -> str:
    """Return a digest of the contents of the files, or of the revision on the hub: the text has not been read yet."""
    if not source.files:
        return _identity_digest(source)
    how = {
        name: value
        for name, value in source.identity.items()
        if name in ("kind", "column", "separator", "split", "format")
    }
    text = json.dumps(how | {"content": content_digest(source.files)}, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _identity_digest(source: OpenSource) -> str:
    """Return a digest of the names, sizes, and times of the files, as in checkpoints of earlier versions."""
    identity = json.dumps(source.identity, sort_keys=True)
    return hashlib.blake2b(identity.encode("utf-8"), digest_size=16).hexdigest()
