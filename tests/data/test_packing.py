from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.data.packing import Document, Packer, is_validation, text_digest

TEXTS = st.lists(st.binary(max_size=12), max_size=8)


def make_document(text: bytes) -> Document:
    """Byte tokens whose byte counts are not all one, so that a sum over the wrong columns shows."""
    tokens = np.array([256, *text], np.int32)
    return Document(tokens, np.array([0, *(b % 5 for b in text)], np.int32))


@given(TEXTS, st.integers(2, 7))
def test_sequences_are_the_joined_documents_cut_with_one_token_of_overlap(texts: list[bytes], length: int) -> None:
    packer = Packer(length)
    parts = [packer.add([make_document(text)]) for text in texts]
    joined = [token for text in texts for token in make_document(text).tokens.tolist()]
    num_bytes = [count for text in texts for count in make_document(text).num_bytes.tolist()]
    begins = range(0, len(joined) - length, length)
    rows = [row.tolist() for part in parts for row in part.tokens]
    assert rows == [joined[begin : begin + length + 1] for begin in begins]
    assert [count for part in parts for count in part.num_bytes.tolist()] == [
        sum(num_bytes[begin + 1 : begin + length + 1]) for begin in begins
    ]


@given(TEXTS, st.integers(2, 7))
def test_packing_together_or_one_by_one_gives_the_same_sequences(texts: list[bytes], length: int) -> None:
    documents = [make_document(text) for text in texts]
    together, single = Packer(length), Packer(length)
    rows = together.add(documents)
    parts = [single.add([]), *(single.add([document]) for document in documents)]
    assert rows.tokens.tolist() == np.concatenate([part.tokens for part in parts]).tolist()
    assert rows.num_bytes.tolist() == np.concatenate([part.num_bytes for part in parts]).tolist()


def test_a_packer_continues_from_its_state() -> None:
    first, second = make_document(b"abcdefg"), make_document(b"hijklmnop")
    uninterrupted, resumed = Packer(5), Packer(5)
    uninterrupted.add([first])
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    want, got = uninterrupted.add([second]), resumed.add([second])
    assert want.tokens.tolist() == got.tokens.tolist() and len(got.tokens) == 2
    assert want.num_bytes.tolist() == got.num_bytes.tolist()


def test_the_split_of_a_document_depends_only_on_its_text_and_has_the_requested_fraction() -> None:
    digests = [text_digest(f"document {i}".encode()) for i in range(4000)]
    held_out = [is_validation(digest, 0.05) for digest in digests]
    assert sum(held_out) == pytest.approx(200, abs=3 * 14)  # three standard deviations of a binomial
    # Growing the fraction only moves documents from train to validation.
    assert all(is_validation(digest, 0.1) for digest, was in zip(digests, held_out, strict=True) if was)
    # A fixed value: a change of the split would move validation text into train when a run is resumed.
    assert text_digest(b"document 0").hex() == "a827c9964a189edda5603f9b2f6690d1"


def test_the_fraction_of_held_out_digests_is_exact_at_its_limit() -> None:
    below, half = bytes.fromhex("7f" + "ff" * 15), bytes.fromhex("80" + "00" * 15)
    assert is_validation(below, 0.5) and not is_validation(half, 0.5)
    # Only the first eight bytes count, the first one most.
    assert not is_validation(bytes(8) + b"\xff" * 8, 0.0) and is_validation(bytes(8) + b"\xff" * 8, 2.0**-64)
