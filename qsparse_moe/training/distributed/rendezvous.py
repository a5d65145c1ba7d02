"""The store in which the ranks of a launcher find each other, opened within a time limit; who did not come is named."""

from __future__ import annotations

import errno
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from qsparse_moe.errors import ConfigError, RankLost
from qsparse_moe.training.distributed.launcher_environment import master_port

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_NOTICE_SECONDS = 10.0
# The ranks that wait read in the store, which ends with rank 0, who is missing.
_FAREWELL_SECONDS = 1.0
_ANOTHER_PORT = "start the ranks with another one: deepspeed --master_port PORT"


def meet(rank: int, world_size: int, *, timeout: float) -> dist.Store:
    """Open the launcher's store at MASTER_ADDR:MASTER_PORT and return it once every rank has come.

    SIGINT and SIGTERM interrupt the wait as they interrupt any other Python code. Whoever waits says so after ten
    seconds.

    Args:
        rank: of this process; rank 0 holds the store.
        world_size: number of ranks.
        timeout: ``training.collective_timeout``, seconds from this call on.

    Raises:
        RankLost: a rank did not come in time; every rank that came names it, with the address and the setting.
        ConfigError: rank 0 cannot listen at the port, because another process does.
    """
    return _Meeting(rank, world_size, timeout).hold()


class _Meeting:
    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._host, self._port = os.environ["MASTER_ADDR"], master_port()
        self._begin = time.monotonic()
        self._next_notice = self._begin + _NOTICE_SECONDS

    def hold(self) -> dist.Store:
        store = self._open()
        try:
            store.set(f"came/{self._rank}", "")
            self._wait_for_all(store)
        except dist.DistError as error:
            raise self._missing([0], f"the connection to it has ended ({_first_line(error)})") from error
        return store

    def _open(self) -> dist.Store:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun holds a store of its own, and a part of it for every attempt.
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=self._timeout)))
            return store
        holds = self._rank == 0
        self._check_port() if holds else self._wait_for_rank_zero()
        try:
            store = self._within_time(lambda: self._connect(holds))
        except dist.DistError as error:
            if holds and "EADDRINUSE" in str(error):
                raise self._port_in_use() from error
            raise self._missing([0], f"what answers there is not it ({_first_line(error)})") from error
        if store is None:
            raise self._missing([0], "what listens there does not answer")
        return store

    def _connect(self, holds: bool) -> dist.Store:
        return dist.TCPStore(
            self._host,
            self._port,
            self._world_size,
            is_master=holds,
            timeout=timedelta(seconds=max(1.0, self._left())),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _within_time(self, work: Callable[[], dist.Store]) -> dist.Store | None:
        """The result of ``work``, or None when the time is over: torch waits without end for a server's first answer,
        and lets no signal interrupt it."""
        done: queue.Queue[tuple[dist.Store | None, Exception | None]] = queue.Queue()

        def attempt() -> None:
            try:
                done.put((work(), None))
            except Exception as error:  # raised where it is waited for
                done.put((None, error))

        threading.Thread(target=attempt, name="rendezvous", daemon=True).start()
        while True:
            try:
                store, error = done.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._left() <= -_FAREWELL_SECONDS:
                    return None
                continue
            if error is not None:
                raise error
            return store

    def _check_port(self) -> None:
        """Before torch tries: it writes the frames of its C++ code to standard error where it fails."""
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                listener.bind(("", self._port))
                listener.listen()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise self._port_in_use() from error
                if error.errno in (errno.EACCES, errno.EPERM):
                    raise ConfigError(
                        f"MASTER_PORT ({self._port}): this user may not listen at it; {_ANOTHER_PORT}"
                    ) from error
                # This machine's networks are unusual: torch knows more ways to listen.

    def _port_in_use(self) -> ConfigError:
        return ConfigError(
            f"MASTER_PORT ({self._port}): another process of this machine listens at it already, such as another run "
            f"with the launcher's default port; {_ANOTHER_PORT}"
        )

    def _wait_for_rank_zero(self) -> None:
        """Until something listens at the address."""
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=max(1.0, min(5.0, self._left()))).close()
                return
            except OSError as error:
                if self._left() <= 0:
                    raise self._missing([0], f"nothing listens there ({error.strerror or error})") from error
            self._pause(lambda: [0])

    def _wait_for_all(self, store: dist.Store) -> None:
        keys = [f"came/{rank}" for rank in range(self._world_size)]

        def absent() -> list[int]:
            return [rank for rank, key in enumerate(keys) if not store.check([key])]

        while not store.check(keys):
            if store.check(["missing"]):
                raise self._missing([int(rank) for rank in store.get("missing").decode().split()])
            if self._left() <= 0:
                missing = absent()
                store.set("missing", " ".join(map(str, missing)))
                if self._rank == 0:
                    time.sleep(_FAREWELL_SECONDS)
                raise self._missing(missing)
            self._pause(absent)

    def _pause(self, absent: Callable[[], list[int]]) -> None:
        time.sleep(_POLL_SECONDS)
        if time.monotonic() >= self._next_notice:
            self._next_notice += 60.0
            logger.info("waiting for %s at %s, at most %.0f s more", self._names(absent()), self._where(), self._left())

    def _left(self) -> float:
        return self._begin + self._timeout - time.monotonic()

    def _missing(self, ranks: list[int], detail: str = "") -> RankLost:
        message = (
            f"{self._names(ranks)} did not come to {self._where()} within training.collective_timeout "
            f"({self._timeout:g} s){detail and f': {detail}'}. Rank {self._rank} ends too. Start every rank, with "
            "the same MASTER_ADDR and MASTER_PORT (the launcher's --master_addr and --master_port), or raise the "
            "setting where a rank needs longer to start"
        )
        # By every rank that came: rank 0, which else speaks for all, may be the one that is missing.
        logger.error("%s", message)
        return RankLost(message)

    def _names(self, ranks: list[int]) -> str:
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {self._world_size} ranks"

    def _where(self) -> str:
        return f"{self._host}:{self._port} (MASTER_ADDR, MASTER_PORT)"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
