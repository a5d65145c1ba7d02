"""Turns of the sources of a stream, windows of sequences, and bad records, each with made-up documents."""

from __future__ import annotations

import hashlib
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qsparse_moe.data import hub_wait, open_source
from qsparse_moe.data.local_files import missing_column, not_text, short, too_long
from qsparse_moe.data.open_source import BadRecords, Limits, OpenSource, content_digest, sizes_and_times
from qsparse_moe.data.packing import Document
from qsparse_moe.data.streaming import MixedStream, SequenceStream
from qsparse_moe.errors import DataError


class Source:
    """Documents ``NAME0``, ``NAME1``, ... of given lengths in tokens; None ends a pass."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name, self.lengths, self.place, self.passes, self.left_out = name, lengths, 0, 0, 0

    def next_text(self) -> str | None:
        if self.place == len(self.lengths):
            self.place, self.passes = 0, self.passes + 1
            return None
        self.place += 1
        return f"{self.name}{self.place - 1}"

    def leave_out(self) -> None:
        self.left_out += 1

    def encoder(self, tokenizer: Any) -> Any:
        def encode(texts: list[str]) -> Any:
            (text,) = texts
            length = self.lengths[int(text[1:])]
            return [SimpleNamespace(text=text, tokens=np.zeros(length))] if length else []

        return encode

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.passes = state["place"], state["passes"]


def mixed(weights: list[float], *lengths: list[int]) -> tuple[MixedStream, list[Source]]:
    sources = [Source(name, own) for name, own in zip("abc", lengths, strict=False)]
    return MixedStream(sources, weights, None), sources  # type: ignore[arg-type]


def texts(stream: MixedStream, number: int) -> list[str]:
    return [stream.next_document().text for _ in range(number)]  # type: ignore[attr-defined]


def test_the_source_with_the_fewest_tokens_for_its_weight_is_next_and_the_first_of_equals() -> None:
    stream, _ = mixed([1.0, 1.0], [3, 1, 1, 1], [2, 2, 2])
    # Tokens before each choice: 0 0, 3 0, 3 2, 3 4, 4 4, 5 4, 5 6.
    assert texts(stream, 7) == ["a0", "b0", "b1", "a1", "a2", "b2", "a3"]
    # All have ended: they begin again in turn, the counts with them.
    assert texts(stream, 3) == ["a0", "b0", "b1"] and stream.passes() == [1, 1]


def test_with_weights_of_1_a_source_that_has_ended_waits_and_with_others_it_starts_over_at_once() -> None:
    stream, sources = mixed([1.0, 1.0], [1], [1, 1, 1])
    assert texts(stream, 6) == ["a0", "b0", "b1", "b2", "a0", "b0"] and sources[0].passes == 1
    stream, sources = mixed([2.0, 2.0], [1], [1, 1, 1])
    assert texts(stream, 6) == ["a0", "b0", "a0", "b1", "a0", "b2"] and sources[0].passes == 2
    stream, _ = mixed([1.0, 2.0], [1], [1, 1, 1])
    assert texts(stream, 7) == ["a0", "b0", "b1", "a0", "b2", "b0", "a0"], "one weight of 1 is not enough"
    # Three tokens of the first for each of the second.
    stream, _ = mixed([3.0, 1.0], [1] * 9, [1] * 9)
    assert [text[0] for text in texts(stream, 12)] == ["a", "b", "a", "a"] * 3


def test_a_document_without_tokens_is_left_out_and_not_counted() -> None:
    stream, (source, other) = mixed([1.0, 1.0], [1, 0, 1], [1, 1])
    assert texts(stream, 4) == ["a0", "b0", "a2", "b1"]
    assert (source.left_out, other.left_out) == (1, 0) and stream.state_dict()["tokens"] == [2, 2]


def test_a_mixture_goes_on_from_its_counts_its_ends_and_the_places_of_its_sources() -> None:
    stream, _ = mixed([1.0, 1.0], [1], [2, 2, 2])
    assert texts(stream, 3) == ["a0", "b0", "b1"]
    state = stream.state_dict()
    assert (state["tokens"], state["ended"]) == ([1, 4], [True, False])
    assert state["sources"] == [{"place": 0, "passes": 1}, {"place": 2, "passes": 0}]
    following = texts(stream, 3)
    assert state["tokens"] == [1, 4] and state["ended"] == [True, False], "a state does not change any more"
    again, _ = mixed([1.0, 1.0], [1], [2, 2, 2])
    again.load_state_dict(state)
    assert texts(again, 3) == following == ["b2", "a0", "b0"]


class Numbers:
    """An endless mixture of documents of 5 tokens that count on: 2 sequences of 2 tokens and a bit each."""

    def __init__(self) -> None:
        self.place = 0

    def next_document(self) -> Any:
        self.place += 1
        tokens = np.arange(5 * self.place - 5, 5 * self.place, dtype=np.int32)
        return Document(tokens, np.ones(5, np.int32))

    def passes(self) -> list[int]:
        return [self.place]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def sequences(window: int, key: tuple[int, int] = (0, 0)) -> SequenceStream:
    return SequenceStream(Numbers(), 2, window=window, key=key)  # type: ignore[arg-type]


def test_a_window_holds_the_same_sequences_as_the_order_and_each_window_has_another_order() -> None:
    plain = sequences(1).take(24)
    shuffled = sequences(6).take(24)
    orders = []
    for begin in range(0, 24, 6):
        own, inside = plain[begin : begin + 6].tolist(), shuffled[begin : begin + 6].tolist()
        assert sorted(own) == sorted(inside)
        orders.append(tuple(own.index(one) for one in inside))
    assert len(set(orders)) == 4
    assert orders[2] == tuple(np.random.default_rng((0, 0, 2)).permutation(6))
    other = sequences(6, (0, 1)).take(6).tolist()
    assert sorted(other) == sorted(plain[:6].tolist()) and other != shuffled[:6].tolist(), "another rank"


@pytest.mark.parametrize("window", [1, 5])
def test_a_stream_of_sequences_resumes_after_each_of_them(window: int) -> None:
    whole = sequences(window, (3, 1)).take(17).tolist()
    stream = sequences(window, (3, 1))
    for taken in range(13):
        again = sequences(window, (3, 1))
        again.load_state_dict(stream.state_dict())
        assert again.state_dict() == stream.state_dict()
        assert again.take(4).tolist() == whole[taken : taken + 4], taken
        assert stream.take(1).tolist() == whole[taken : taken + 1]


def test_a_stream_that_has_read_on_returns_to_a_state_between_two_documents() -> None:
    stream = sequences(1)
    begin = stream.state_dict()
    whole = stream.take(9).tolist()
    stream.load_state_dict(begin)
    assert stream.take(9).tolist() == whole


def test_a_state_without_a_window_is_that_of_a_stream_in_order() -> None:
    stream = sequences(1)
    before = stream.take(3).tolist()
    state = stream.state_dict()
    assert "window" not in state and sequences(4).state_dict()["window"] == {"number": 0, "place": 0}
    again = sequences(4)
    again.load_state_dict(state)
    assert before + again.take(5).tolist() == sequences(1).take(8).tolist()


def test_bad_records_are_skipped_up_to_the_limit_and_the_next_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadRecords("data.sources.0 (jsonl)", Limits(max_bad_records=2))
    bad.add("first")
    bad.add("second")
    bad.end_pass()
    assert [one.getMessage() for one in caplog.records] == [
        "skipped a bad record (data.max_bad_records is 2): first",
        "data.sources.0 (jsonl): 2 bad records skipped in this pass",
    ]
    with pytest.raises(DataError) as caught:
        bad.add("third")
    assert str(caught.value) == (
        "third, or let data.max_bad_records (2) skip such records (3 bad records in this pass)"
    )
    none = BadRecords("x", Limits(max_bad_records=0))
    with pytest.raises(DataError, match=r"^only, or let data.max_bad_records \(0\) skip such records$"):
        none.add("only")
    caplog.clear()
    BadRecords("x", Limits()).end_pass()
    assert not caplog.records


def source_of(rows: list[dict[str, Any]], **limits: int) -> OpenSource:
    identity = {"kind": "hub"}
    given = Limits(max_document_bytes=8, **limits)
    return OpenSource("data.sources.1 (hub)", rows, "text", identity, None, limits=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, r"data.sources.1 \(hub\), row 1 of the stream: column 'text' holds NoneType"),
        ({"body": "x", "a": 1}, r"row 1 of the stream has no column 'text'; its columns are a, body\."),
        ({"text": "123456789"}, r"row 1 of the stream has more than data.max_document_bytes \(8\) bytes"),
        ({"text": "ééééé"}, r"row 1 of the stream has more than data.max_document_bytes \(8\) bytes"),
        ({"text": "", "problem": "known before"}, r"^known before, or let"),
    ],
)
def test_a_record_of_a_stream_that_is_no_text_is_named_by_its_row(
    row: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=message):
        list(source_of([{"text": "a"}, row], max_bad_records=0).texts())
    caplog.clear()
    found = list(source_of([{"text": "a"}, row, {"text": ""}, {"text": "éééé"}], max_bad_records=1).texts())
    assert caplog.records[-1].getMessage() == "data.sources.1 (hub): 1 bad records skipped in this pass"
    assert found == ["a", "éééé"], "8 bytes are allowed, and an empty text is no document"


def test_a_source_without_a_record_or_that_fails_half_way_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError, match="every file of path is empty, and one must hold text; name files that do"):
        list(source_of([]).texts())
    assert list(source_of([{"text": "a"}]).texts([])) == [], "a part may be empty"

    def fails() -> Any:
        yield {"text": "a"}
        raise OSError("reset\nby peer")

    with pytest.raises(DataError) as caught:
        list(source_of([]).texts(fails()))
    assert str(caught.value).startswith(
        "data.sources.1 (hub) could not be read to the end: OSError: reset; every row must be readable text."
    )


def test_a_digest_of_files_has_their_sizes_and_of_long_ones_blocks_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_source, "_SAMPLED_ABOVE", 100)
    monkeypatch.setattr(open_source, "_BLOCK_BYTES", 10)
    monkeypatch.setattr(open_source, "_NUM_BLOCKS", 4)
    short_file, long_file = tmp_path / "a", tmp_path / "b"
    short_file.write_bytes(bytes(range(100)))
    content = bytes(value % 251 for value in range(400))
    long_file.write_bytes(content)
    digest = hashlib.blake2b(digest_size=16)
    digest.update((100).to_bytes(8, "big") + bytes(range(100)))
    # 390 bytes before the last block, in thirds.
    digest.update((400).to_bytes(8, "big") + b"".join(content[begin : begin + 10] for begin in (0, 130, 260, 390)))
    assert content_digest([str(short_file), str(long_file)]) == digest.hexdigest()
    assert content_digest([str(long_file), str(short_file)]) != digest.hexdigest()
    (found,) = sizes_and_times([str(long_file)])
    assert found == [str(long_file), 400, long_file.stat().st_mtime_ns]


def test_problems_of_records_have_the_place_the_value_and_the_way_out() -> None:
    assert missing_column(["b", "a"], "text", "x, row 3") == (
        "x, row 3 has no column 'text'; its columns are a, b. The setting column must name the one that holds the text"
    )
    assert missing_column([], "text", "x").startswith("x has no column 'text'; its columns are none. ")
    assert not_text("int", "7" * 50, "text", "x") == (
        f"x: column 'text' holds int ({'7' * 40}), and every row must hold text; remove such rows, or name another "
        "column"
    )
    assert too_long("x", 9).startswith("x has more than data.max_document_bytes (9) bytes, and a document must fit")
    assert short(ValueError("\n one\ntwo ")) == "ValueError: one"
    assert short(ValueError()) == "ValueError" and short(OSError("x" * 300)) == f"OSError: {'x' * 200}"


def test_a_wait_for_the_hub_is_logged_only_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logged = threading.Event()
    monkeypatch.setattr(hub_wait, "SILENT_SECONDS", 30.0)
    with caplog.at_level(logging.WARNING), hub_wait.log_slow_wait("a model"):
        pass
    for timer in (one for one in threading.enumerate() if isinstance(one, threading.Timer)):
        timer.join(20)
        assert timer.daemon and not timer.is_alive(), "it is cancelled, and ends long before its time"
    assert not caplog.records
    monkeypatch.setattr(hub_wait, "SILENT_SECONDS", 0.01)
    warning = hub_wait.logger.warning
    monkeypatch.setattr(hub_wait.logger, "warning", lambda *values: (warning(*values), logged.set()))
    with pytest.raises(KeyError), caplog.at_level(logging.WARNING), hub_wait.log_slow_wait("a model"):
        assert logged.wait(60)
        raise KeyError
    assert [one.getMessage() for one in caplog.records] == [
        "waiting for a model; without a network, set HF_HUB_OFFLINE=1 to use what the hub's cache holds at once"
    ]
