"""Rendezvous of ranks at a port, as threads of one process; some of them never connect."""

from __future__ import annotations

import errno
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from qsparse_moe.errors import ConfigError, RankLost
from qsparse_moe.training.distributed import ranks as distributed
from qsparse_moe.training.distributed import rendezvous
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.distributed.rendezvous import open_store
from tests.support.launch import free_port


@pytest.fixture
def port(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def errors_of(ranks, world_size, timeout):
    """Return the messages that ``open_store`` raises on ``ranks``, all called at the same time."""

    def error_of(rank):
        with pytest.raises(RankLost) as caught:
            open_store(rank, world_size, timeout=timeout)
        return str(caught.value)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(error_of, ranks))


def test_ranks_that_all_connect_share_a_store(port):
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: open_store(rank, 3, timeout=30.0), range(3)))
    stores[1].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


def test_every_rank_that_connected_names_the_missing_ones(port, caplog, monkeypatch):
    monkeypatch.setattr(rendezvous, "_NOTICE_SECONDS", 0.3)
    begin = time.monotonic()
    with caplog.at_level(logging.INFO):
        errors = errors_of([0, 2], 4, 2.0)
    assert 2.0 <= time.monotonic() - begin < 20
    for rank, error in zip([0, 2], errors, strict=True):
        assert error.startswith(f"ranks 1, 3 of 4 ranks did not connect to 127.0.0.1:{port} ")
        assert f"training.collective_timeout (2 s). Rank {rank} ends too." in error
        assert "same MASTER_ADDR and MASTER_PORT" in error and "raise the setting" in error
        assert error in caplog.text
    assert (
        f"waiting for ranks 1, 3 of 4 ranks at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT), for at most" in caplog.text
    )


def test_rank_0_that_does_not_connect_is_named(port):
    (error,) = errors_of([1], 2, 1.0)
    assert error.startswith(f"rank 0 of 2 ranks did not connect to 127.0.0.1:{port} ")
    assert "(1 s): no process listens there (Connection refused). Rank 1 ends too." in error


def test_another_server_at_the_port_is_not_taken_for_rank_0(port):
    with socket.create_server(("127.0.0.1", port)):
        (error,) = errors_of([1], 2, 1.0)
    assert error.startswith(f"rank 0 of 2 ranks did not connect to 127.0.0.1:{port} ")
    assert "(1 s): the program that listens there does not answer. Rank 1 ends too." in error


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_port_in_use_is_refused_at_once(port, host):
    with socket.create_server((host, port)), pytest.raises(ConfigError) as caught:
        open_store(0, 2, timeout=60.0)
    message = str(caught.value)
    assert message.startswith(f"MASTER_PORT ({port}): another process on this machine already listens on it")
    assert message.endswith("deepspeed --master_port PORT")


def test_a_single_missing_rank_has_no_plural_and_a_detail_stands_behind_the_time(port):
    meeting = rendezvous._Rendezvous(2, 4, 7.0)
    limit = f"did not connect to 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within training.collective_timeout (7 s)"
    assert str(meeting._missing([1])).startswith(f"rank 1 of 4 ranks {limit}. Rank 2 ends too.")
    assert str(meeting._missing([0, 3], "why")).startswith(f"ranks 0, 3 of 4 ranks {limit}: why. Rank 2 ends too.")
    assert 6.0 < meeting._left() <= 7.0


@pytest.mark.parametrize(("error", "line"), [(ValueError("one\ntwo"), "one"), (KeyError(), "KeyError")])
def test_an_error_of_many_lines_is_shown_by_its_first_or_else_by_its_name(error, line):
    assert rendezvous._first_line(error) == line


def test_a_waiting_rank_says_so_after_ten_seconds_and_then_every_minute(port, monkeypatch, caplog):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(rendezvous, "time", clock)
    meeting = rendezvous._Rendezvous(1, 3, 300.0)
    said = []
    with caplog.at_level(logging.INFO):
        for second in range(131):
            now[0] = 100.0 + second
            meeting._pause(lambda: [0, 2])
            said += [(second, message) for message in caplog.messages]
            caplog.clear()
    text = f"waiting for ranks 0, 2 of 3 ranks at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT), for at most"
    assert said == [(10, f"{text} 290 s"), (70, f"{text} 230 s"), (130, f"{text} 170 s")]


def test_a_port_that_this_user_may_not_open_is_named_and_another_error_is_left_to_torch(port, monkeypatch):
    for number in (errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL):

        class Refused(socket.socket):
            def bind(self, address, number=number):
                assert address == ("", port)
                raise OSError(number, "no")

        monkeypatch.setattr(rendezvous.socket, "socket", Refused)
        if number == errno.EADDRNOTAVAIL:
            rendezvous._Rendezvous(0, 2, 9.0)._check_port()
            return
        with pytest.raises(ConfigError) as caught:
            rendezvous._Rendezvous(0, 2, 9.0)._check_port()
        assert str(caught.value) == (
            f"MASTER_PORT ({port}): this user is not permitted to listen on it; start the ranks with another port: "
            "deepspeed --master_port PORT"
        )


def test_the_timeout_of_collectives_limits_the_rendezvous_too(port, monkeypatch):
    monkeypatch.setattr(distributed, "_launcher_store", None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    message = r"^rank 1 of 2 ranks did not connect .*collective_timeout \(1 s\)"
    with pytest.raises(RankLost, match=message), open_distributed("cpu", timeout=1.0):
        pass
