"""Tokenise while training: every part of each source is read endlessly by one rank, and resumes exactly.

A rank reads one part or several, so that a run can resume on fewer ranks. Each part has three layers with a JSON-able
state: the stream of one source, the mixture of sources, and the sequences packed from it. Files (shards) are
shuffled, and so are the sequences within fixed windows, which are read again when a stream resumes. A shuffle buffer
would lose or repeat the sequences inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qsparse_moe.data.chat import Encode
from qsparse_moe.data.held_out import Head, HeldOut, by_fraction, gather, one_of, read_head
from qsparse_moe.data.open_source import OpenSource
from qsparse_moe.data.packing import Array, Document, Packer
from qsparse_moe.data.packing_settings import Packing, too_little_validation
from qsparse_moe.data.sequences import SequenceTable
from qsparse_moe.data.tokenizer import TextTokenizer
from qsparse_moe.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

State = dict[str, Any]


class SourceStream:
    """The training documents of one source that belong to one part of V, pass after pass.

    The files are dealt to the parts, as evenly as their number allows. Where there are fewer files than parts, the
    parts that share a file take its documents in turn.
    """

    def __init__(self, source: OpenSource, *, held_out: HeldOut, part: int, num_parts: int, seed: int | None) -> None:
        self._source = source
        self._held_out = held_out
        self._part, self._num_parts = part, num_parts
        self._seed = seed
        # Files whose number divides evenly are shuffled before they are dealt, so that a part gets others in each pass.
        by_file = _files_of(source).num_shards % num_parts != 0
        self._begin({"epoch": 0, "given": 0, "stream": None, "by_file": by_file})

    def next_text(self) -> str | None:
        """Return the next document, or None once at the end of every pass.

        Raises:
            DataError: a whole pass holds no training document.
        """
        for text in self._texts:
            self._started = True
            if not self._held_out(text):
                self._given += 1
                return text
        # Without this error, the stream would read pass after pass and never return.
        if not self._given:
            raise DataError(
                f"{self._source.setting} holds no training document for part {self._part} of {self._num_parts}, and "
                "every part needs one when data.mode is streaming; use fewer ranks (or data.stream_parts), more "
                "documents, or data.mode=table"
            )
        if self._source.chat is not None:
            self._source.chat.log_pass(self._source.setting)
        self._begin({"epoch": self._epoch + 1, "given": 0, "stream": None, "by_file": self._by_file})
        return None

    def leave_out(self) -> None:
        """Do not count the last document returned as one: it was too long."""
        self._given -= 1

    def encoder(self, tokenizer: TextTokenizer) -> Encode:
        """Return the function that tokenises the documents."""
        return self._source.encoder(tokenizer)

    @property
    def passes(self) -> int:
        """Number of finished passes."""
        return int(self._epoch)

    def state_dict(self) -> State:
        """Return the position after the last document returned."""
        # datasets applies a state when the iteration begins, and until then would return that of the beginning.
        stream = self._dataset.state_dict() if self._started else self._resumed
        state = {"epoch": self._epoch, "given": self._given, "stream": stream}
        return state | {"by_file": True} if self._by_file else state

    def load_state_dict(self, state: State) -> None:
        """Continue after the document that was the last one when ``state`` was saved."""
        self._begin(state)

    def _begin(self, state: State) -> None:
        self._epoch, self._given, self._resumed = state["epoch"], state["given"], state["stream"]
        # States of earlier versions have no entry: there, every part read all files and took every V-th document.
        self._by_file = state.get("by_file", False)
        # A new object for every pass: an iterable data set remembers the state that it was last given.
        self._dataset = self._own_files()
        self._dataset.set_epoch(self._order())
        if self._resumed is not None:
            self._dataset.load_state_dict(self._resumed)
        self._started = False
        self._texts: Iterator[str] = self._source.texts(self._dataset)

    def _own_files(self) -> IterableDataset:
        from datasets.distributed import split_dataset_by_node

        files, part, num_parts = _files_of(self._source), self._part, self._num_parts
        if not self._by_file:
            return split_dataset_by_node(files, rank=part, world_size=num_parts)
        num_files = files.num_shards
        if num_files > num_parts:
            return files.shard(num_parts, part, contiguous=False)
        sharing = len(range(part % num_files, num_parts, num_files))
        own = files.shard(num_files, part % num_files, contiguous=False)
        return split_dataset_by_node(own, rank=part // num_files, world_size=sharing)

    def _order(self) -> int:
        """Return the epoch for ``datasets``, which keeps the files' order in epoch 0 and shuffles by any other."""
        if self._seed is None:
            return 0
        # The same for every part: with different orders two parts would read the same file.
        word = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1, np.uint64)[0]
        # datasets keeps the epoch as a signed integer of 64 bits.
        return 1 + (int(word) >> 2)


def _files_of(source: OpenSource) -> IterableDataset:
    assert source.dataset is not None, "streaming reads whole sources"
    return source.dataset


class MixedStream:
    """Documents of all sources in turn.

    The next document comes from the source that has given the fewest tokens for its weight (the first of those that
    are equal), so that shares of tokens follow the weights. When all weights are 1, a source that has ended waits
    until all have, and every document is read once per pass; otherwise it starts over at once.
    """

    def __init__(self, streams: Sequence[SourceStream], weights: Sequence[float], tokenizer: TextTokenizer) -> None:
        self._streams, self._weights = streams, weights
        self._encoders = [stream.encoder(tokenizer) for stream in streams]
        self._once = all(weight == 1 for weight in weights)
        self._tokens = [0] * len(streams)
        self._ended = [False] * len(streams)

    def next_document(self) -> Document:
        """Return the next document, tokenised; the stream never ends."""
        while True:
            index = self._choose()
            text = self._streams[index].next_text()
            if text is None:
                self._end(index)
                continue
            for document in self._encoders[index]([text]):
                self._tokens[index] += len(document.tokens)
                return document
            self._streams[index].leave_out()

    def _choose(self) -> int:
        waiting = [i for i, ended in enumerate(self._ended) if not ended]
        return min(waiting, key=lambda i: (self._tokens[i] / self._weights[i], i))

    def _end(self, index: int) -> None:
        if not self._once:
            return
        self._ended[index] = True
        if all(self._ended):
            self._ended = [False] * len(self._streams)
            # Otherwise the shorter sources would be read first in every later pass, not in turn with the others.
            self._tokens = [0] * len(self._streams)

    def passes(self) -> list[int]:
        """Return how many passes over each source this rank has ended."""
        return [stream.passes for stream in self._streams]

    def state_dict(self) -> State:
        """Return the position of every source and the tokens that it has contributed."""
        return {
            "tokens": list(self._tokens),
            "ended": list(self._ended),
            "sources": [stream.state_dict() for stream in self._streams],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue after the document that was the last one when ``state`` was saved."""
        self._tokens, self._ended = list(state["tokens"]), list(state["ended"])
        for stream, stream_state in zip(self._streams, state["sources"], strict=True):
            stream.load_state_dict(stream_state)


class SequenceStream:
    """Sequences packed from a mixture, in random order within windows of a fixed number of sequences, or in order.

    The state does not hold the document that is being cut into sequences, which may be long, nor the sequences of a
    window: it holds the position of the mixture before the document that the window begins in, the tokens that waited
    then (at most S), how many sequences of it are older than the window, the window's number and the place in it.
    The order within a window is a function of the seed, the rank and that number, so a stream that resumes reads the
    window again.
    """

    def __init__(
        self, mixture: MixedStream, sequence_length: int, *, window: int = 1, key: tuple[int, int] = (0, 0)
    ) -> None:
        self._mixture = mixture
        self._size, self._key = window, key
        self._window: Array | None = None
        self._place, self._number = 0, 0
        self._window_begin: State = {}
        self._packer = Packer(sequence_length)
        self._before: State = {"mixture": mixture.state_dict(), "packer": self._packer.state_dict()}
        self._sequences: Array = np.zeros((0, sequence_length + 1), np.int32)
        self._taken = 0

    def passes(self) -> list[int]:
        """Return how many passes over each source this rank has ended, as far as it has read."""
        return self._mixture.passes()

    def take(self, num_sequences: int) -> Array:
        """Return the token ids ``(num_sequences, S + 1)`` of the next sequences."""
        return np.stack([self._next_sequence() for _ in range(num_sequences)])

    def _next_sequence(self) -> Array:
        if self._size == 1:
            return self._packed_sequence()
        if self._window is None or self._place == len(self._window):
            if self._window is not None:
                self._number += 1
            self._read_window()
        assert self._window is not None
        self._place += 1
        sequence: Array = self._window[self._place - 1]
        return sequence

    def _read_window(self) -> None:
        self._window_begin = self._packed_state()
        sequences = np.stack([self._packed_sequence() for _ in range(self._size)])
        self._window = sequences[np.random.default_rng((*self._key, self._number)).permutation(self._size)]
        self._place = 0

    def _packed_sequence(self) -> Array:
        while self._taken == len(self._sequences):
            self._pull()
        self._taken += 1
        sequence: Array = self._sequences[self._taken - 1]
        return sequence

    def _pull(self) -> None:
        # The state before the document, because a document may give many sequences and its text is not in the state.
        self._before = {"mixture": self._mixture.state_dict(), "packer": self._packer.state_dict()}
        self._sequences = self._packer.add([self._mixture.next_document()]).tokens
        self._taken = 0

    def state_dict(self) -> State:
        """Return the position after the last sequence returned."""
        if self._size == 1:
            return self._packed_state()
        # No window has been read yet, so the position of the packer is where the first one will begin.
        if self._window is None:
            return {**self._packed_state(), "window": {"number": self._number, "place": 0}}
        return {**self._window_begin, "window": {"number": self._number, "place": self._place}}

    def load_state_dict(self, state: State) -> None:
        """Continue after the sequence that was the last one when ``state`` was saved.

        A state without a window was saved by a stream that does not shuffle sequences, and this stream then does not
        either.
        """
        self._load_packed(state)
        window = state.get("window")
        if window is None:
            self._size = 1
        elif window["place"] == 0:
            self._window, self._number = None, window["number"]
        else:
            self._number = window["number"]
            self._read_window()
            self._place = window["place"]

    def _packed_state(self) -> State:
        return {**self._before, "taken": self._taken}

    def _load_packed(self, state: State) -> None:
        self._mixture.load_state_dict(state["mixture"])
        self._packer.load_state_dict(state["packer"])
        self._sequences, self._taken = self._sequences[:0], 0
        if state["taken"]:
            self._pull()
            self._taken = state["taken"]


class PartStreams:
    """The parts of a run's text that one rank reads: equally many sequences of each, the first part first."""

    def __init__(self, streams: Mapping[int, SequenceStream]) -> None:
        """Args: ``streams`` are those of the parts by their numbers, in order."""
        self._streams = streams

    def take(self, num_sequences: int) -> Array:
        """Return the token ids ``(num_sequences, S + 1)`` of the next sequences."""
        share, rest = divmod(num_sequences, len(self._streams))
        assert not rest, f"{num_sequences} sequences do not divide over {len(self._streams)} parts"
        return np.concatenate([stream.take(share) for stream in self._streams.values()])

    def passes(self) -> list[int]:
        """Return how many passes over each source all parts have ended, as far as they have read."""
        return [min(passes) for passes in zip(*(stream.passes() for stream in self._streams.values()), strict=True)]

    def state_dict(self) -> list[State]:
        """Return the position of every part after the last sequence returned."""
        # The key is that of checkpoints whose ranks read one part each.
        return [{"rank": part, "state": stream.state_dict()} for part, stream in self._streams.items()]

    def load_state_dict(self, states: Sequence[State]) -> None:
        """Continue each part after the sequence that was the last one when its state was saved."""
        for state in states:
            self._streams[state["rank"]].load_state_dict(state["state"])


@dataclass(frozen=True)
class Streams:
    """All sources of a run in streaming mode."""

    sources: tuple[OpenSource, ...]
    weights: tuple[float, ...]
    packing: Packing
    attend_across_documents: bool
    shuffle_window: int
    """Number of sequences that are shuffled together."""
    validation_tokens: int | None = None
    """Number of tokens of the first documents that are held out; None: a fraction of all documents is."""

    def train(self, parts: range, *, num_parts: int, seed: int | None) -> PartStreams:
        """Return some of the parts of the training text, from the beginning.

        ``seed`` shuffles the files in every pass and the sequences of every window; None leaves both in their order.
        """
        return PartStreams({part: self._part(part, num_parts, seed) for part in parts})

    def _part(self, part: int, num_parts: int, seed: int | None) -> SequenceStream:
        streams = [
            SourceStream(source, held_out=held_out, part=part, num_parts=num_parts, seed=seed)
            for source, held_out in zip(self.sources, self._held_out, strict=True)
        ]
        return SequenceStream(
            MixedStream(streams, self.weights, self.packing.tokenizer),
            self.packing.sequence_length,
            window=1 if seed is None else self.shuffle_window,
            key=(seed or 0, part),
        )

    @cached_property
    def _held_out(self) -> list[HeldOut]:
        """The rule of each source; with ``validation_tokens`` its first documents are read for it."""
        if self.validation_tokens is None:
            return [by_fraction(self.packing.validation_fraction)] * len(self.sources)
        return [one_of(head.digests) for head in self._heads]

    @cached_property
    def _heads(self) -> list[Head]:
        assert self.validation_tokens is not None
        share = -(-self.validation_tokens // len(self.sources))
        return [read_head(source, self.packing, share) for source in self.sources]

    def validation(self, num_sequences: int) -> Validation:
        """Gather at least ``num_sequences`` for validation, equally many per source; fewer where a source ends before.

        They are always the first sequences of each source, for any number of ranks and any seed. With
        ``validation_tokens`` there are as many as these tokens fill.

        Raises:
            DataError: the held-out documents do not fill one sequence.
        """
        share = -(-num_sequences // len(self.sources))
        if self.validation_tokens is None:
            gathered = [gather(source, self.packing, share) for source in self.sources]
        else:
            gathered = [(head.sequences, head.train_byte_counts) for head in self._heads]
        if not any(len(found) for found, _ in gathered):
            raise too_little_validation(self.sources, self.packing)
        table = SequenceTable(
            [found for found, _ in gathered],
            # Every source gives as many sequences already; the weights of training would only repeat some of them.
            [1.0] * len(gathered),
            document_token=self.packing.tokenizer.document_token,
            attend_across_documents=self.attend_across_documents,
        )
        return Validation(table, np.sum([counts for _, counts in gathered], axis=0))


class Validation(NamedTuple):
    """The validation sequences, and the byte counts of the training text read on the way."""

    table: SequenceTable
    """The validation sequences."""
    train_byte_counts: Array
    """``(256,)`` how often each byte value occurs in the training text that was read before enough was held out."""
