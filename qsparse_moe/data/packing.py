"""Pack documents into sequences of S + 1 tokens with one token of overlap, and split training from validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from qsparse_moe.data.marks import mark

Array = np.ndarray[Any, Any]

PACKING_VERSION = 1
"""Part of every cache key; increased when the sequences, the split, or the digest are computed differently."""


class Document(NamedTuple):
    """One tokenised document."""

    tokens: Array
    """``(n,)`` int32; the first is the document token."""
    num_bytes: Array
    """``(n,)`` int32, bytes of text that each token encodes; 0 for the document token and for what is no target."""
    is_whole: bool = False
    """Whether it must lie in one sequence, as a conversation does, whose tokens carry marks (``data.marks``)."""


class PackedSequences(NamedTuple):
    """R packed sequences."""

    tokens: Array
    """``(R, S + 1)`` int32; in text, a sequence's last token is the next sequence's first."""
    num_bytes: Array
    """``(R,)`` int64, bytes of text that the S labels of the sequence encode."""


class Packer:
    """Concatenates documents and cuts sequences from them; the tokens left over wait for the next documents.

    Every token of text but the very first is the label of exactly one input. Documents that must stay whole are packed
    into sequences of their own; see ``WholePacker``.
    """

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._tokens = np.zeros(0, np.int32)
        self._num_bytes = np.zeros(0, np.int32)
        self._whole = WholePacker(sequence_length)

    def add(self, documents: Sequence[Document]) -> PackedSequences:
        """Append ``documents`` and return every full sequence."""
        whole = [document for document in documents if document.is_whole]
        if not whole:
            return self._add_text(documents)
        text = self._add_text([document for document in documents if not document.is_whole])
        return _concatenated([text, self._whole.add(whole)])

    def finish(self) -> PackedSequences:
        """Return the sequences of whole documents that are not full, padded; tokens of text keep waiting."""
        return self._whole.finish()

    def _add_text(self, documents: Sequence[Document]) -> PackedSequences:
        tokens = np.concatenate([self._tokens, *(document.tokens for document in documents)])
        num_bytes = np.concatenate([self._num_bytes, *(document.num_bytes for document in documents)])
        length = self.sequence_length
        num_sequences = max(0, len(tokens) - 1) // length
        used = num_sequences * length
        # A copy: a view would keep the whole concatenation in memory.
        self._tokens, self._num_bytes = tokens[used:].copy(), num_bytes[used:].copy()
        if not num_sequences:
            return PackedSequences(np.zeros((0, length + 1), np.int32), np.zeros(0, np.int64))
        # Neighbours share a token, so these overlap; a view of them needs no copy.
        sequences = sliding_window_view(tokens[: used + 1], length + 1)[::length]
        # Bytes are counted from the second token on: the labels of a sequence are its tokens but the first.
        return PackedSequences(
            sequences, num_bytes[1 : used + 1].reshape(num_sequences, length).sum(axis=1, dtype=np.int64)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the waiting tokens, at most S of text and those of open sequences; JSON-able."""
        state: dict[str, Any] = {"tokens": self._tokens.tolist(), "num_bytes": self._num_bytes.tolist()}
        # Only where there are any, so that runs on text have the states that they have always had.
        whole = self._whole.state_dict()
        return state | {"whole": whole} if whole else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the waiting tokens of ``state``."""
        self._tokens = np.array(state["tokens"], np.int32)
        self._num_bytes = np.array(state["num_bytes"], np.int32)
        self._whole.load_state_dict(state.get("whole", []))


# Enough for nearly full sequences (docs/data.md), and few enough that a stream's state stays small.
_MAX_OPEN = 16


class WholePacker:
    """Packs documents into sequences without cutting any: best fit among a limited number of open sequences.

    A document goes into the open sequence in which it leaves the least room. If it fits into none and no more may be
    opened, the fullest one is closed and padded. The result depends only on the documents and their order.
    """

    def __init__(self, sequence_length: int) -> None:
        self._size = sequence_length + 1
        self._open: list[Document] = []

    def add(self, documents: Sequence[Document]) -> PackedSequences:
        """Add documents of at most S + 1 tokens and return the sequences that this closes."""
        return self._padded([closed for document in documents for closed in self._add(document)])

    def _add(self, document: Document) -> Iterator[Document]:
        room = [self._size - len(one.tokens) - len(document.tokens) for one in self._open]
        fitting = [index for index, left in enumerate(room) if left >= 0]
        if fitting:
            best = self._open.pop(min(fitting, key=room.__getitem__))
            document = _joined(best, document)
        elif len(self._open) == _MAX_OPEN:
            yield self._open.pop(min(range(_MAX_OPEN), key=room.__getitem__))
        # Nothing fits behind one token that is left: a document has at least two.
        if len(document.tokens) >= self._size - 1:
            yield document
        else:
            self._open.append(document)

    def finish(self) -> PackedSequences:
        """Return all open sequences, padded."""
        closed, self._open = self._open, []
        return self._padded(closed)

    def _padded(self, documents: Sequence[Document]) -> PackedSequences:
        # The padding is a document of its own without a target.
        tokens = np.tile(mark(np.zeros(self._size, np.int64), targets=np.zeros(self._size, bool)), (len(documents), 1))
        num_bytes = np.zeros(len(documents), np.int64)
        for index, document in enumerate(documents):
            count = len(document.tokens)
            # Rolled, so that the mark of its beginning stands where the padding begins.
            tokens[index] = np.roll(tokens[index], count)
            tokens[index, :count] = document.tokens
            num_bytes[index] = document.num_bytes.sum()
        return PackedSequences(tokens, num_bytes)

    def state_dict(self) -> list[list[list[int]]]:
        """Return the open sequences; JSON-able."""
        return [[document.tokens.tolist(), document.num_bytes.tolist()] for document in self._open]

    def load_state_dict(self, state: list[list[list[int]]]) -> None:
        """Restore the open sequences of ``state``."""
        self._open = [
            Document(np.array(tokens, np.int32), np.array(num_bytes, np.int32), True) for tokens, num_bytes in state
        ]


def _joined(first: Document, second: Document) -> Document:
    return Document(
        np.concatenate([first.tokens, second.tokens]), np.concatenate([first.num_bytes, second.num_bytes]), True
    )


def _concatenated(parts: Sequence[PackedSequences]) -> PackedSequences:
    return PackedSequences(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def text_digest(text: bytes) -> bytes:
    """Return a 16-byte digest of the text, which decides its side of the split and enters the data's fingerprint."""
    return hashlib.blake2b(text, digest_size=16).digest()


def is_validation(digest: bytes, validation_fraction: float) -> bool:
    """Return whether the document with this digest is held out for validation.

    The answer is the same for the same text in every source and run.
    """
    # Decided by the content, not by a random draw or the position: a document that occurs twice is on one side only,
    # and adding files leaves every other document on its side.
    return int.from_bytes(digest[:8], "big") < validation_fraction * 2.0**64
