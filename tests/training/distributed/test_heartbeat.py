"""Heartbeats of three ranks in one process that share a store. Processes that die are tested in tests/distributed."""

from __future__ import annotations

import logging
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from qsparse_moe.cli import app
from qsparse_moe.errors import RankLost, TrainingDiverged
from qsparse_moe.training.distributed import heartbeat as heartbeat
from qsparse_moe.training.distributed.heartbeat import Heartbeats, RankMonitor, _at_least, is_of_a_collective
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.interrupt import Stopped, StopSignals

CLOSED = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
TIMED_OUT = RuntimeError("[.../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation")


class BrokenStore:
    """The store after the process that hosts it has died."""

    def __getattr__(self, name):
        def fail(*arguments):
            raise dist.DistNetworkError("Connection reset by peer")

        return fail


@pytest.fixture
def ranks(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(heartbeat, "launcher_store", lambda: SimpleNamespace(clone=lambda: store))
    monkeypatch.setattr(heartbeat, "_BEAT_SECONDS", 0.05)
    # Thirty missed beats: a busy machine may let a thread wait for some.
    monkeypatch.setattr(heartbeat, "_PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(heartbeat, "_GRACE_SECONDS", 600.0)

    class InOneProcess(Distributed):
        def all_gather(self, value):
            return [f"{value}, rank {rank}" for rank in range(3)]

        def on_rank_zero(self, work):
            return "session"

        def barrier(self):
            return None

    return [InOneProcess(rank, 3, rank, torch.device("cpu")) for rank in range(3)]


def test_the_next_rank_notices_missing_heartbeats_and_all_ranks_learn_of_it(ranks):
    signs = [Heartbeats(rank) for rank in ranks]
    for _ in range(3):
        assert [sign.beat(10.0) for sign in signs] == [{}] * 3
    time.sleep(0.2)
    assert signs[0].beat(0.1) == {}, "rank 0 watches rank 1 only from now on, and its heartbeat is recent"
    for sign in signs[:2]:
        sign.beat(10.0)
    time.sleep(0.15)
    signs[0].beat(10.0)
    lost = signs[1].beat(0.1)
    assert lost.keys() == {2} and 0.1 <= lost[2] < 5
    assert signs[0].beat(10.0).keys() == {2}
    assert signs[0].name_of(2).endswith(", rank 2")


def test_after_a_failed_collective_a_rank_without_heartbeats_is_lost(ranks):
    watches = [RankMonitor(rank, timeout=100.0, way_out=lambda: "Go on.") for rank in ranks[:2]]
    Heartbeats(ranks[2])
    for watch in watches:
        watch.__enter__()
    with pytest.raises(RankLost) as caught:
        watches[0].__exit__(RuntimeError, CLOSED, None)
    message = str(caught.value)
    assert message.startswith("rank 2 (process ") and ", rank 2), of 3 ranks, sent no heartbeat for " in message
    assert message.endswith("Rank 0 ends too. Go on.") and caught.value.__cause__ is CLOSED
    with pytest.raises(RankLost, match=r"^rank 2 .* Rank 1 ends too"):
        watches[1].__exit__(RuntimeError, CLOSED, None)


def test_a_rank_that_dies_when_all_others_are_done_is_named_too(ranks, monkeypatch):
    watch = RankMonitor(ranks[0], timeout=100.0, way_out=lambda: "Go on.")
    other = RankMonitor(ranks[1], timeout=100.0, way_out=str)
    Heartbeats(ranks[2])
    for entered in (watch, other):
        entered.__enter__()

    def fail(self):
        raise CLOSED

    monkeypatch.setattr(type(ranks[0]), "barrier", fail)
    with pytest.raises(RankLost, match=r"^rank 2 .* Rank 0 ends too"):
        watch.__exit__(None, None, None)
    with pytest.raises(RankLost, match=r"^rank 2 .* Rank 1 ends too"):
        other.__exit__(None, None, None)


def test_a_lost_store_means_that_rank_0_is_lost(ranks):
    signs = Heartbeats(ranks[1])
    signs._store = BrokenStore()
    assert signs.beat(10.0) == {}, "one failure is no death"
    assert signs.wait_for_lost(0.2).keys() == {0}
    assert signs.beat(0.1).keys() == {0}
    own = Heartbeats(ranks[0])
    own._store = BrokenStore()
    assert own.wait_for_lost(0.1) == {}, "a rank never calls itself lost"


def test_a_collective_that_timed_out_while_all_are_alive_names_the_setting(ranks, caplog):
    watches = [RankMonitor(rank, timeout=7.0, way_out=lambda: "Go on.") for rank in ranks]
    for watch in watches:
        watch.__enter__()
    with caplog.at_level(logging.ERROR), pytest.raises(RankLost, match=r"training\.collective_timeout \(7 s\)"):
        watches[0].__exit__(RuntimeError, TIMED_OUT, None)
    assert "every rank sends heartbeats" in caplog.text and "raise the setting. Go on." in caplog.text
    for watch in watches[1:]:
        watch.__exit__(None, None, None)


@pytest.mark.parametrize("error", [TrainingDiverged("step 3"), torch.OutOfMemoryError("9 GB"), KeyError("x")])
def test_other_errors_pass_at_once(ranks, error):
    assert not is_of_a_collective(error)
    begin = time.monotonic()
    with pytest.raises(type(error)), RankMonitor(ranks[0], timeout=9.0, way_out=str):
        raise error
    assert time.monotonic() - begin < 1


def test_errors_of_collectives_are_recognised_by_type_or_text():
    assert is_of_a_collective(CLOSED) and is_of_a_collective(dist.DistBackendError("NCCL"))
    assert not is_of_a_collective(RuntimeError("shape mismatch"))


def test_a_single_rank_starts_no_monitor():
    alone = Distributed(0, 1, 0, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="gloo"), RankMonitor(alone, timeout=1.0, way_out=str) as watch:
        assert watch._thread is None
        raise CLOSED


def end_by(watch, number):
    """Exit the monitor as a signal that ends the process does."""
    stopped = Stopped(number)
    watch.__exit__(Stopped, stopped, None)


def test_a_rank_that_sigterm_ends_before_any_collective_has_failed_names_the_lost_one(ranks, monkeypatch, caplog):
    """The launcher sends SIGTERM to the others, one after the other, within a second of a rank's death."""
    monkeypatch.setattr(heartbeat, "_FINAL_CHECK_SECONDS", 1.0)
    watches = [RankMonitor(rank, timeout=100.0, way_out=lambda: "Go on.") for rank in ranks[:2]]
    Heartbeats(ranks[2])
    for watch in watches:
        watch.__enter__()
    for rank, watch in enumerate(watches):
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            end_by(watch, signal.SIGTERM)
        (said,) = caplog.messages
        assert said.startswith("rank 2 (process ") and ", rank 2), of 3 ranks, sent no heartbeat for 1 s" in said
        assert said.endswith(f"Rank {rank} ends too. Go on.")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_that_a_signal_ends_one_after_the_other_take_none_for_lost(ranks, monkeypatch, caplog, number):
    monkeypatch.setattr(heartbeat, "_FINAL_CHECK_SECONDS", 1.0)
    watches = [RankMonitor(rank, timeout=100.0, way_out=str) for rank in ranks]
    for watch in watches:
        watch.__enter__()
    with caplog.at_level(logging.ERROR):
        for watch in watches:
            end_by(watch, number)
    assert caplog.messages == []


def test_a_store_that_ended_with_a_stopped_rank_0_is_no_lost_rank(ranks):
    first, second = Heartbeats(ranks[0]), Heartbeats(ranks[1])
    Heartbeats(ranks[2])
    first.final_check(0.1)
    second.beat(10.0)
    second._store = BrokenStore()
    assert second.final_check(0.1) == {}


def test_a_store_that_ended_without_a_stop_message_means_that_rank_0_is_lost(ranks):
    signs = Heartbeats(ranks[1])
    signs._store = BrokenStore()
    assert signs.final_check(0.1).keys() == {0}


def test_after_a_stop_signal_a_hanging_collective_has_a_shorter_timeout(ranks, monkeypatch):
    """The launcher kills a rank 30 s after SIGTERM, on which a rank that hangs in a collective cannot act."""
    assert heartbeat._STOPPING_SECONDS + 5 < 30
    given = []
    monkeypatch.setattr(Heartbeats, "beat", lambda self, timeout: given.append(timeout) or {})
    with RankMonitor(ranks[0], timeout=600.0, way_out=str), StopSignals() as signals:
        time.sleep(0.2)
        assert set(given) == {600.0}
        signals.received = signal.SIGTERM
        time.sleep(0.2)
        assert given[-1] == heartbeat._STOPPING_SECONDS


def test_the_command_line_ends_with_1_and_repeats_nothing(monkeypatch, capsys):
    def build():
        raise RankLost("said already")

    monkeypatch.setattr(app, "build_app", build)
    assert app.run(["train"]) == 1
    assert capsys.readouterr() == ("", "")


def test_a_message_names_every_lost_rank_in_order_with_the_longest_silence(ranks):
    monitor = RankMonitor(ranks[1], timeout=9.0, way_out=lambda: "Go on.")
    heartbeats = Heartbeats(ranks[1])
    heartbeats._names = ["process 1 on a", "process 2 on b", "process 3 on c"]
    assert monitor._message(heartbeats, {2: 7.4, 0: 12.6}) == (
        "rank 0 (process 1 on a), rank 2 (process 3 on c), of 3 ranks, sent no heartbeat for 13 s: it was killed, or "
        "its machine is gone. Rank 1 ends too. Go on."
    )


def test_published_ranks_are_read_by_all_with_their_silences_and_a_new_count_is_a_sign_of_life(ranks):
    one, other = Heartbeats(ranks[0]), Heartbeats(ranks[1])
    assert one._read_lost() == {} and one._publish_lost({}) == {} and other._read_lost() == {}
    assert one._publish_lost({2: 7.5, 0: 1.25}) == {2: 7.5, 0: 1.25}
    assert other._read_lost() == {2: 7.5, 0: 1.25}
    before = one._silences([1])[1]
    time.sleep(0.1)
    assert one._silences([1])[1] >= before + 0.1, "no new count"
    other._send_heartbeat()
    assert one._silences([1]) == {1: 0.0}
    assert one._counts([0, 1]) == {0: b"1", 1: b"2"}


def test_ranks_that_a_signal_has_stopped_are_read_from_the_store(ranks):
    one, other = Heartbeats(ranks[0]), Heartbeats(ranks[1])
    one._read_stopped()
    assert one._stopped == set()
    for rank in (2, 1):
        other._store.append(other._key("stopped"), f"{rank} ")
    one._read_stopped()
    assert one._stopped == {1, 2}


def test_a_silence_as_long_as_the_timeout_is_too_long():
    assert _at_least({0: 4.9, 1: 5.0, 2: 5.1}, 5.0) == {1: 5.0, 2: 5.1}
