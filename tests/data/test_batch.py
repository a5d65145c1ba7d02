from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.data.batch import make_batch

DOCUMENT = 9
ROWS = st.lists(st.lists(st.sampled_from([0, 1, 2, DOCUMENT]), min_size=7, max_size=7), min_size=1, max_size=4)


def slow_positions_and_documents(tokens: list[int]) -> tuple[list[int], list[int]]:
    positions, documents = [], []
    position, document = 0, 0
    for i, token in enumerate(tokens):
        if token == DOCUMENT and i > 0:
            position, document = 0, document + 1
        positions.append(position)
        documents.append(document)
        position += 1
    return positions, documents


@given(ROWS)
def test_positions_and_documents_restart_at_every_document_token(rows: list[list[int]]) -> None:
    batch = make_batch(np.array(rows, np.uint16), document_token=DOCUMENT, attend_across_documents=False)
    assert batch.documents_BS is not None
    for i, row in enumerate(rows):
        positions, documents = slow_positions_and_documents(row[:-1])
        assert batch.tokens_BS[i].tolist() == row[:-1]
        assert batch.targets_BS[i].tolist() == row[1:]
        assert batch.positions_BS[i].tolist() == positions
        assert batch.documents_BS[i].tolist() == documents


def test_positions_continue_when_attention_crosses_documents() -> None:
    rows = np.array([[DOCUMENT, 1, DOCUMENT, 2], [1, DOCUMENT, 2, 3]])
    batch = make_batch(rows, document_token=DOCUMENT, attend_across_documents=True)
    assert batch.documents_BS is None
    assert batch.positions_BS.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_batch_is_int64_and_shares_no_memory_with_the_rows() -> None:
    rows = np.array([[DOCUMENT, 1, 2, DOCUMENT]], np.int64)
    rows.setflags(write=False)  # as a mapped table's are
    batch = make_batch(rows, document_token=DOCUMENT, attend_across_documents=False)
    assert batch.loss_weight is None
    for part in batch[:4]:
        assert part is not None and part.dtype == torch.int64 and part.is_contiguous()
        part.fill_(-5)
    assert rows.tolist() == [[DOCUMENT, 1, 2, DOCUMENT]]


def test_every_part_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory needs a CUDA device; the tensors are replaced here by ones that say so."""
    rows = np.array([[256, 1, 256, 2]])
    batch = make_batch(rows, document_token=256, attend_across_documents=True)
    pinned: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    found = batch.pin_memory()
    assert [part is None for part in found] == [False, False, False, True, True]
    assert [id(part) for part in pinned] == [id(part) for part in batch[:3]]
    assert all(torch.equal(one, other) for one, other in zip(found[:3], batch[:3], strict=True))
