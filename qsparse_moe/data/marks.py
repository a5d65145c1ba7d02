"""Token ids that carry marks: whether a token begins a document, and whether it is a target of the loss.

In plain text both follow from the ids: a document begins with the document token, and every token is a target. In a
conversation they do not: a template may write the document token after every answer, and only answers are targets. The
tokens of conversations therefore carry the marks in the high bits of their ids, so that every table, stream, and
shuffle of token ids carries them along.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_MARKED = 1 << 30
"""Set in every token that carries marks. The sign bit stays free: packed tokens are int32."""
_BEGINS = 1 << 29
_TARGET = 1 << 28
MAX_MARKED_ID = _TARGET - 1
"""Largest token id that can carry marks."""


def mark(ids: Array, *, targets: Array) -> Array:
    """Return the ids of one document with its marks, int32; the first token begins the document.

    ``targets`` is bool, one per token.
    """
    assert ids.max(initial=0) <= MAX_MARKED_ID, "the rules of the config limit the vocabulary"
    marked = ids.astype(np.int32) | _MARKED | np.where(targets, _TARGET, 0).astype(np.int32)
    marked[:1] |= _BEGINS
    return marked


def has_marks(tokens: Array) -> bool:
    """Return whether any token carries marks."""
    # Ids of 16 bits have no room for any, and most tables hold them.
    return tokens.dtype.itemsize > 2 and bool(tokens.max(initial=0) >= _MARKED)


def token_ids(tokens: Array) -> Array:
    """Return the ids without marks, int64."""
    wide = tokens.astype(np.int64)
    return np.where(wide & _MARKED, wide & MAX_MARKED_ID, wide) if has_marks(tokens) else wide


def begins_document(tokens: Array, document_token: int) -> Array:
    """Return bool: by its mark where a token has marks, else whether it is the document token."""
    is_document_token: Array = tokens == document_token
    if not has_marks(tokens):
        return is_document_token
    wide = tokens.astype(np.int64)
    return np.where(wide & _MARKED, wide & _BEGINS, is_document_token).astype(bool)


def is_target(tokens: Array) -> Array:
    """Return bool: by its mark where a token has marks, else true."""
    if not has_marks(tokens):
        return np.ones(tokens.shape, bool)
    wide = tokens.astype(np.int64)
    return np.where(wide & _MARKED, wide & _TARGET, 1).astype(bool)
