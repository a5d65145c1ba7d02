"""Rendezvous of a launcher's ranks in a shared store, with a time limit and an error that names the missing ranks."""

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
# Rank 0 keeps the store open this long, in which the waiting ranks read which rank is missing.
_LINGER_SECONDS = 1.0
_WAY_OUT = "start the ranks with another port: deepspeed --master_port PORT"


def open_store(rank: int, world_size: int, *, timeout: float) -> dist.Store:
    """Open the launcher's store at MASTER_ADDR:MASTER_PORT and return it once every rank has connected.

    SIGINT and SIGTERM interrupt the wait as they interrupt any other Python code. A rank that waits for more than ten
    seconds logs a message.

    Args:
        rank: the rank of this process; rank 0 hosts the store.
        world_size: number of ranks.
        timeout: ``training.collective_timeout``, in seconds from this call.

    Raises:
        RankLost: a rank did not connect in time; every other rank names it, with the address and the setting.
        ConfigError: rank 0 cannot listen on the port, because another process does.
    """
    return _Rendezvous(rank, world_size, timeout).run()


class _Rendezvous:
    """The steps of ``open_store`` on one rank."""

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._host, self._port = os.environ["MASTER_ADDR"], master_port()
        self._begin = time.monotonic()
        self._next_notice = self._begin + _NOTICE_SECONDS

    def run(self) -> dist.Store:
        """Open the store and wait for all ranks."""
        store = self._open()
        try:
            store.set(f"connected/{self._rank}", "")
            self._wait_for_all(store)
        except dist.DistError as error:
            raise self._missing([0], f"the connection to it has ended ({_first_line(error)})") from error
        return store

    def _open(self) -> dist.Store:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun hosts the store itself, with a key prefix for every restart.
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=self._timeout)))
            return store
        is_host = self._rank == 0
        self._check_port() if is_host else self._wait_for_rank_zero()
        try:
            store = self._within_time(lambda: self._connect(is_host))
        except dist.DistError as error:
            if is_host and "EADDRINUSE" in str(error):
                raise self._port_in_use() from error
            raise self._missing([0], f"another program answers there ({_first_line(error)})") from error
        if store is None:
            raise self._missing([0], "the program that listens there does not answer")
        return store

    def _connect(self, is_host: bool) -> dist.Store:
        return dist.TCPStore(
            self._host,
            self._port,
            self._world_size,
            is_master=is_host,
            timeout=timedelta(seconds=max(1.0, self._left())),
            # torch's own wait neither names the missing ranks nor can it be interrupted.
            wait_for_workers=False,
            # As in torch's own env:// rendezvous: a second store of this process on the port shares the server.
            multi_tenant=True,
        )

    def _within_time(self, work: Callable[[], dist.Store]) -> dist.Store | None:
        """Return the result of ``work``, or None after the time limit.

        It runs in a thread, because torch waits without a limit for a server's first answer, and signals cannot
        interrupt it.
        """
        done: queue.Queue[tuple[dist.Store | None, Exception | None]] = queue.Queue()

        def attempt() -> None:
            try:
                done.put((work(), None))
            except Exception as error:  # It is raised in the thread that waits.
                done.put((None, error))

        threading.Thread(target=attempt, name="rendezvous", daemon=True).start()
        while True:
            try:
                store, error = done.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                # Slightly after the limit, so that torch's own timeout error, which has more detail, comes first.
                if self._left() <= -_LINGER_SECONDS:
                    return None
                continue
            if error is not None:
                raise error
            return store

    def _check_port(self) -> None:
        """Check that the port is free before torch listens on it: torch would print its C++ stack to standard error."""
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
                        f"MASTER_PORT ({self._port}): this user is not permitted to listen on it; {_WAY_OUT}"
                    ) from error
                # Other errors come from unusual network configurations, in which torch may still be able to listen.

    def _port_in_use(self) -> ConfigError:
        return ConfigError(
            f"MASTER_PORT ({self._port}): another process on this machine already listens on it, such as another run "
            f"with the launcher's default port; {_WAY_OUT}"
        )

    def _wait_for_rank_zero(self) -> None:
        """Wait until a process listens at the address."""
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=max(1.0, min(5.0, self._left()))).close()
                return
            except OSError as error:
                if self._left() <= 0:
                    raise self._missing([0], f"no process listens there ({error.strerror or error})") from error
            self._pause(lambda: [0])

    def _wait_for_all(self, store: dist.Store) -> None:
        keys = [f"connected/{rank}" for rank in range(self._world_size)]

        def absent() -> list[int]:
            return [rank for rank, key in enumerate(keys) if not store.check([key])]

        while not store.check(keys):
            if store.check(["missing"]):
                raise self._missing([int(rank) for rank in store.get("missing").decode().split()])
            if self._left() <= 0:
                missing = absent()
                store.set("missing", " ".join(map(str, missing)))
                if self._rank == 0:
                    time.sleep(_LINGER_SECONDS)
                raise self._missing(missing)
            self._pause(absent)

    def _pause(self, absent: Callable[[], list[int]]) -> None:
        time.sleep(_POLL_SECONDS)
        if time.monotonic() >= self._next_notice:
            self._next_notice += 60.0
            logger.info(
                "waiting for %s at %s, for at most %.0f s", self._names(absent()), self._address(), self._left()
            )

    def _left(self) -> float:
        return self._begin + self._timeout - time.monotonic()

    def _missing(self, ranks: list[int], detail: str = "") -> RankLost:
        message = (
            f"{self._names(ranks)} did not connect to {self._address()} within training.collective_timeout "
            f"({self._timeout:g} s){detail and f': {detail}'}. Rank {self._rank} ends too. Start every rank with the "
            "same MASTER_ADDR and MASTER_PORT (the launcher's --master_addr and --master_port), or raise the setting "
            "if a rank needs more time to start"
        )
        # Logged by every rank that connected: rank 0, which usually logs for all, may be the missing one.
        logger.error("%s", message)
        return RankLost(message)

    def _names(self, ranks: list[int]) -> str:
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {self._world_size} ranks"

    def _address(self) -> str:
        return f"{self._host}:{self._port} (MASTER_ADDR, MASTER_PORT)"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
