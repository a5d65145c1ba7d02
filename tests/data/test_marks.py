"""Marks in token ids, at the values where one meets the next."""

from __future__ import annotations

import numpy as np
import pytest

from qsparse_moe.data.marks import MAX_MARKED_ID, begins_document, has_marks, is_target, mark, token_ids

DOCUMENT = 7
BARE = 1 << 30
"""Id 0 with marks, which begins nothing and is no target: the smallest token with marks."""


def test_the_first_token_begins_and_every_token_keeps_its_id_and_its_target():
    ids = np.array([DOCUMENT, 0, DOCUMENT, MAX_MARKED_ID])
    marked = mark(ids, targets=np.array([False, True, False, True]))
    assert marked.dtype == np.int32 and (marked > 0).all()
    assert token_ids(marked).tolist() == ids.tolist()
    assert begins_document(marked, DOCUMENT).tolist() == [True, False, False, False]
    assert is_target(marked).tolist() == [False, True, False, True]
    assert mark(np.zeros(0, np.int64), targets=np.zeros(0, bool)).tolist() == []


def test_an_id_that_reaches_into_the_marks_is_an_internal_error():
    with pytest.raises(AssertionError, match="limit the vocabulary"):
        mark(np.array([MAX_MARKED_ID + 1]), targets=np.array([True]))


def test_the_smallest_token_with_marks_has_them():
    tokens = np.array([[BARE, BARE]], np.int32)
    assert has_marks(tokens) and not has_marks(tokens - 1)
    assert token_ids(tokens).tolist() == [[0, 0]]
    assert is_target(tokens).tolist() == [[False, False]]
    # Also where id 0 is the document token: its mark decides.
    assert begins_document(tokens, 0).tolist() == [[False, False]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_tokens_of_text_have_none(dtype):
    tokens = np.array([DOCUMENT, 3, 65535], dtype)
    assert not has_marks(tokens) and not has_marks(tokens[:0])
    assert token_ids(tokens).tolist() == [DOCUMENT, 3, 65535] and token_ids(tokens).dtype == np.int64
    assert begins_document(tokens, DOCUMENT).tolist() == [True, False, False]
    assert is_target(tokens).tolist() == [True, True, True]


def test_text_beside_a_conversation_is_read_as_text():
    (marked,) = mark(np.array([3]), targets=np.array([False]))
    tokens = np.array([[marked, DOCUMENT, 4]], np.int32)
    assert token_ids(tokens).tolist() == [[3, DOCUMENT, 4]]
    assert begins_document(tokens, DOCUMENT).tolist() == [[True, True, False]]
    assert is_target(tokens).tolist() == [[False, True, True]]
