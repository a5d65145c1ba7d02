"""The order of sequences within the windows of a stream, over a mixture whose tokens are counted through."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qsparse_moe.data.packing import Document
from qsparse_moe.data.streaming import SequenceStream

LENGTH, WINDOW, NUM_WINDOWS = 4, 6, 5


class Counted:
    """Documents of 1 to 11 tokens, whose tokens are numbered through the stream."""

    def __init__(self):
        self.begin, self.number = 0, 0

    def next_document(self) -> Document:
        size = 1 + (7 * self.number) % 11
        tokens = np.arange(self.begin, self.begin + size, dtype=np.int32)
        self.begin, self.number = self.begin + size, self.number + 1
        return Document(tokens, np.ones(size, np.int32))

    def state_dict(self):
        return {"begin": self.begin, "number": self.number}

    def load_state_dict(self, state):
        self.begin, self.number = state["begin"], state["number"]

    def passes(self):
        return [0]


def stream(key=(3, 0), window=WINDOW):
    return SequenceStream(Counted(), LENGTH, window=window, key=key)


def orders(key, num_windows=NUM_WINDOWS):
    """Return the numbers of the sequences in the order in which they come, one row per window."""
    sequences = stream(key).take(num_windows * WINDOW)
    assert (np.diff(sequences, axis=1) == 1).all() and (sequences[:, 0] % LENGTH == 0).all()
    return (sequences[:, 0] // LENGTH).reshape(num_windows, WINDOW)


def test_every_window_has_its_own_sequences_in_an_order_of_its_own():
    found = orders((3, 0))
    begins = np.arange(NUM_WINDOWS)[:, None] * WINDOW
    assert (np.sort(found, axis=1) == begins + np.arange(WINDOW)).all()
    assert len({tuple(row) for row in found - begins}) == NUM_WINDOWS
    assert not (found == begins + np.arange(WINDOW)).all(1).any(), "an order is that of the text"


@pytest.mark.parametrize("other", [(4, 0), (3, 1), (0, 3)])
def test_seeds_and_ranks_have_other_orders(other):
    assert (orders((3, 0)) == orders((3, 0))).all()
    assert (orders((3, 0)) != orders(other)).any(1).sum() >= NUM_WINDOWS - 1


@pytest.mark.parametrize("window", [1, WINDOW])
def test_a_stream_continues_from_its_state_after_any_sequence(window):
    total = 3 * WINDOW + 2
    whole = stream(window=window).take(total)
    for taken in range(total):
        before, after = stream(window=window), stream(window=window)
        if taken:
            before.take(taken)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert (after.take(total - taken) == whole[taken:]).all(), taken
