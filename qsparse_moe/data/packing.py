"""Pack documents into sequences of S + 1 tokens with one token of overlap, and split training from validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Array = np.ndarray[Any, Any]

PACKING_VERSION = 1
"""Part of every cache key; increased when the sequences, the split, or the digest are computed differently."""


class Document(NamedTuple):
    """One tokenised document."""

    tokens: Array
    """``(n,)`` int32; the first is the document token."""
    num_bytes: Array
    """``(n,)`` int32, bytes of text that each token encodes; 0 for the document token."""


class PackedSequences(NamedTuple):
    """R packed sequences."""

    tokens: Array
    """``(R, S + 1)`` int32; a sequence's last token is the next sequence's first."""
    num_bytes: Array
    """``(R,)`` int64, bytes of text that the S labels of the sequence encode."""


class Packer:
    """Concatenates documents and cuts sequences from them; the tokens left over wait for the next documents.

    Every token but the very first is the label of exactly one input.
    """

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._tokens = np.zeros(0, np.int32)
        self._num_bytes = np.zeros(0, np.int32)

    def add(self, documents: Sequence[Document]) -> PackedSequences:
        """Append ``documents`` and return every full sequence."""
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

    def state_dict(self) -> dict[str, list[int]]:
        """Return the waiting tokens, at most S; JSON-able."""
        return {"tokens": self._tokens.tolist(), "num_bytes": self._num_bytes.tolist()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Restore the waiting tokens of ``state``."""
        self._tokens = np.array(state["tokens"], np.int32)
        self._num_bytes = np.array(state["num_bytes"], np.int32)


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
