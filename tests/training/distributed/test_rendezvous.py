"""Ranks that meet at a port, as threads of one process; some of them never come."""

from __future__ import annotations

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qsparse_moe.errors import ConfigError, RankLost
from qsparse_moe.training.distributed import ranks as distributed
from qsparse_moe.training.distributed import rendezvous
from qsparse_moe.training.distributed.ranks import open_distributed
from qsparse_moe.training.distributed.rendezvous import meet
from tests.support.launch import free_port


@pytest.fixture
def port(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def errors_of(ranks, world_size, timeout):
    """What ``meet`` raises on each of ``ranks``, all at once."""

    def error_of(rank):
        with pytest.raises(RankLost) as caught:
            meet(rank, world_size, timeout=timeout)
        return str(caught.value)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(error_of, ranks))


def test_ranks_that_all_come_share_a_store(port):
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: meet(rank, 3, timeout=30.0), range(3)))
    stores[1].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


def test_every_rank_that_came_names_those_that_did_not(port, caplog, monkeypatch):
    monkeypatch.setattr(rendezvous, "_NOTICE_SECONDS", 0.3)
    begin = time.monotonic()
    with caplog.at_level(logging.INFO):
        errors = errors_of([0, 2], 4, 2.0)
    assert 2.0 <= time.monotonic() - begin < 20
    for rank, error in zip([0, 2], errors, strict=True):
        assert error == (
            f"ranks 1, 3 of 4 ranks did not come to 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT) within "
            f"training.collective_timeout (2 s). Rank {rank} ends too. Start every rank, with the same MASTER_ADDR and "
            "MASTER_PORT (the launcher's --master_addr and --master_port), or raise the setting where a rank needs "
            "longer to start"
        )
        assert error in caplog.text
    assert f"waiting for ranks 1, 3 of 4 ranks at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT), at most" in caplog.text


def test_rank_0_that_does_not_come_is_named(port):
    (error,) = errors_of([1], 2, 1.0)
    assert error.startswith(f"rank 0 of 2 ranks did not come to 127.0.0.1:{port} ")
    assert "(1 s): nothing listens there (Connection refused). Rank 1 ends too." in error


def test_another_server_at_the_port_is_not_taken_for_rank_0(port):
    with socket.create_server(("127.0.0.1", port)):
        (error,) = errors_of([1], 2, 1.0)
    assert error.startswith(f"rank 0 of 2 ranks did not come to 127.0.0.1:{port} ")
    assert "(1 s): what listens there does not answer. Rank 1 ends too." in error


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_port_in_use_is_refused_at_once(port, host):
    with socket.create_server((host, port)), pytest.raises(ConfigError) as caught:
        meet(0, 2, timeout=60.0)
    assert str(caught.value) == (
        f"MASTER_PORT ({port}): another process of this machine listens at it already, such as another run with the "
        "launcher's default port; start the ranks with another one: deepspeed --master_port PORT"
    )


def test_the_time_out_of_the_collectives_bounds_the_meeting_too(port, monkeypatch):
    monkeypatch.setattr(distributed, "_launcher_store", None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    message = r"^rank 1 of 2 ranks did not come .*collective_timeout \(1 s\)"
    with pytest.raises(RankLost, match=message), open_distributed("cpu", timeout=1.0):
        pass
