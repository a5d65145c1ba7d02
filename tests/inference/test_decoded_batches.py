"""How evaluation by decoding cuts batches into sequences and groups, and which seconds are decoding."""

from __future__ import annotations

import torch

from qsparse_moe.data.batch import Batch
from qsparse_moe.inference import generator as generation
from qsparse_moe.inference.evaluate import _groups, _Segment, _segments
from qsparse_moe.inference.sampling import Sampling
from tests.inference.test_generator import scripted


def test_a_row_without_documents_is_one_sequence_and_documents_are_one_each():
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    assert _segments(Batch(tokens, tokens, tokens, None)) == [_Segment(0, 0, 6), _Segment(1, 0, 6)]
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    want = [_Segment(0, 0, 2), _Segment(0, 2, 5), _Segment(0, 5, 6), _Segment(1, 0, 6)]
    assert _segments(Batch(tokens, tokens, tokens, documents)) == want


def test_groups_begin_with_the_longest_and_take_no_more_slots_than_allowed():
    segments = [_Segment(0, 0, length) for length in (2, 5, 1, 4, 4, 3)]
    groups = list(_groups(segments, 12))
    assert [[one.length for one in group] for group in groups] == [[5, 4], [4, 3, 2], [1]]
    # Twelve slots hold three of four: the limit itself is allowed.
    assert all(len(group) * group[0].length <= 12 for group in groups)
    assert [[one.length for one in group] for group in _groups([_Segment(0, 0, 20)], 12)] == [[20]]


def test_seconds_of_decoding_leave_out_what_the_caller_does_between_two_steps(monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    made = scripted(monkeypatch, b"abcd", b"efgh")
    monkeypatch.setattr(generation.time, "perf_counter", clock)
    stream = made.stream(["x", "y"], max_tokens=4, sampling=Sampling())
    for _ in stream:
        now[0] += 1000.0
    found = stream.statistics
    assert (found.prefill_seconds, found.decode_seconds, found.decode_steps, found.decode_tokens) == (1.0, 3.0, 3, 6)
    assert found.decode_tokens_per_second == 2.0 and found.prefill_tokens_per_second == found.prompt_tokens == 4


def test_a_sequence_that_has_ended_is_not_counted_among_the_decoded_tokens(monkeypatch):
    made = scripted(monkeypatch, [*b"a", 256], b"efgh", [*b"ij", 256])
    stream = made.stream(["x", "y", "z"], max_tokens=4)
    counted = [stream.statistics.decode_tokens for _ in stream]
    # The first tokens come from the prefill; then three sequences decode, two, and one.
    assert counted == [0, 3, 5, 6] and stream.statistics.decode_steps == 3
    assert [len(one.token_ids) for one in stream.results] == [1, 4, 2]
