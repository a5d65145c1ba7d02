"""Heartbeats between ranks: a rank that has died is named, and the others end instead of waiting for it.

Every rank writes a heartbeat to the launcher's store and reads that of the next rank, which takes a few small messages
per interval whatever the number of ranks. Gloo's collectives fail as soon as a peer's connection closes, but do not
name the peer. NCCL's collectives hang, and so does any collective with a machine that is gone. In both cases the
heartbeats in the store show which rank has stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from qsparse_moe.errors import RankLost
from qsparse_moe.training.distributed.ranks import Distributed, launcher_store
from qsparse_moe.training.interrupt import SignalsWhileEnding, Stopped, is_stop_requested

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
# Threshold after a collective has failed. It must be well below the 30 s after which the launcher kills this rank.
_PATIENCE_SECONDS = 8.0
# Threshold after SIGTERM, which the launcher sends to the other ranks when one has died; it kills them 30 s later.
_STOPPING_SECONDS = 15.0
# Three heartbeats. It applies where SIGTERM ends this process at once, which must take less than 4 s in total.
_FINAL_CHECK_SECONDS = 3.0
# Time for the main thread to end by itself once a rank is known to be lost, before this module ends the process.
_GRACE_SECONDS = 5.0

Silences = dict[int, float]
"""Seconds since the last heartbeat, by rank."""


class RankMonitor:
    """A context manager that monitors the heartbeats of the other ranks; with one rank it does nothing.

    On exit, ``RankLost`` replaces the error that a collective raised because a rank is gone. If the collective hangs
    instead, the process is ended with the same message ``timeout`` seconds after the last heartbeat.
    """

    def __init__(self, distributed: Distributed, *, timeout: float, way_out: Callable[[], str]) -> None:
        """Args: ``way_out()`` returns the last sentence of a message, which says how to continue."""
        self._distributed = distributed
        self._timeout = timeout
        self._way_out = way_out
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._heartbeats: Heartbeats | None = None
        self._signals = SignalsWhileEnding()

    def __enter__(self) -> RankMonitor:
        if self._distributed.world_size > 1:
            self._heartbeats = Heartbeats(self._distributed)
            self._thread = threading.Thread(
                target=self._monitor, args=(self._heartbeats,), name="rank-monitor", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            self._log_lost(error)
            self._end_monitor()
            return
        failure = error or self._wait_for_all()
        try:
            message = self._explain(failure) if failure is not None else None
        finally:
            # A signal that waited takes effect only now, when the message is complete.
            self._signals.release()
        self._end_monitor()
        if message is not None:
            # Logged by every remaining rank: rank 0, which usually logs for all, may be the lost one.
            logger.error("%s", message)
            raise RankLost(message) from failure
        if error is None and failure is not None:
            raise failure

    def expect_end(self, error: BaseException) -> None:
        """Defer signals until the lost rank is named, if a collective raised ``error``. The exit calls it as well.

        Call it first if there is work to do between the error and the exit, such as closing an engine.
        """
        if self._heartbeats is not None and is_of_a_collective(error):
            self._signals.catch()

    def _end_monitor(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _BEAT_SECONDS)

    def _log_lost(self, stopped: Stopped) -> None:
        """Log the lost ranks, if any: when a rank dies, the launcher sends SIGTERM to the others."""
        if self._heartbeats is not None and stopped.number == signal.SIGTERM:
            lost = self._heartbeats.final_check(_FINAL_CHECK_SECONDS)
            if lost:
                logger.error("%s", self._message(self._heartbeats, lost))

    def _wait_for_all(self) -> BaseException | None:
        """Wait for all ranks at the end, so that a finished rank, which sends no heartbeats, is not taken for lost."""
        try:
            self._distributed.barrier()
        except RuntimeError as failure:
            return failure
        return None

    def _explain(self, error: BaseException) -> str | None:
        """Return the message for an error that a collective raised; None for any other error, or if no rank is lost."""
        if self._heartbeats is None or not is_of_a_collective(error):
            return None
        self.expect_end(error)
        lost = self._heartbeats.wait_for_lost(_PATIENCE_SECONDS)
        if lost:
            return self._message(self._heartbeats, lost)
        if "timed out" in str(error).lower():
            return (
                f"a collective did not end within training.collective_timeout ({self._timeout:g} s), although every "
                "rank sends heartbeats: a rank is stuck or needs more time. If it needs more time, raise the setting. "
                f"{self._way_out()}"
            )
        return None

    def _monitor(self, heartbeats: Heartbeats) -> None:
        """Exchange heartbeats until the exit, and end the process when a rank is lost."""
        while not self._stop.wait(_BEAT_SECONDS):
            # After a stop signal the shorter threshold applies: a main thread that hangs in a collective cannot act on
            # the signal, and the launcher kills this process 30 s after it.
            lost = heartbeats.beat(min(self._timeout, _STOPPING_SECONDS) if is_stop_requested() else self._timeout)
            if lost and not self._stop.wait(_GRACE_SECONDS):
                # The main thread hangs in a collective, which no exception can interrupt; os._exit runs no cleanup.
                print(self._message(heartbeats, lost), file=sys.stderr, flush=True)
                os._exit(1)

    def _message(self, heartbeats: Heartbeats, lost: Silences) -> str:
        names = ", ".join(f"rank {rank} ({heartbeats.name_of(rank)})" for rank in sorted(lost))
        return (
            f"{names}, of {self._distributed.world_size} ranks, sent no heartbeat for {max(lost.values()):.0f} s: it "
            f"was killed, or its machine is gone. Rank {self._distributed.rank} ends too. {self._way_out()}"
        )


def is_of_a_collective(error: BaseException) -> bool:
    """Return whether a collective or the store raised ``error``. NCCL has error types; gloo has only their text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Heartbeats:
    """Heartbeat counters in the launcher's store, one per rank. Rank 0 hosts the store: both are lost together."""

    def __init__(self, distributed: Distributed) -> None:
        """All ranks must call it together."""
        self._rank, self._world_size = distributed.rank, distributed.world_size
        # A separate connection: the main thread may hold the other one in a blocking call.
        self._store = launcher_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
        self._lock = threading.Lock()
        self._names = distributed.all_gather(f"process {os.getpid()} on {socket.gethostname()}")
        # New keys for every run: the store outlives a run of this process, and its last counters would look alive.
        self._session = distributed.on_rank_zero(lambda: f"heartbeats-{time.time_ns()}")
        self._count = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._store_answered = time.monotonic()
        self._stopped: set[int] = set()
        self._send_heartbeat()
        # Every counter exists from here on: reading a missing key would block.
        distributed.barrier()

    def name_of(self, rank: int) -> str:
        """Return the process number and machine of a rank."""
        return self._names[rank]

    def beat(self, timeout: float) -> Silences:
        """Send a heartbeat; return the ranks reported as lost, or the next rank if it is silent for ``timeout``."""
        following = (self._rank + 1) % self._world_size
        with self._lock:
            try:
                self._send_heartbeat()
                self._read_stopped()
                return self._read_lost() or self._publish_lost(_at_least(self._silences([following]), timeout))
            except RuntimeError:
                return _at_least(self._silence_of_store(), timeout)

    def wait_for_lost(self, patience: float) -> Silences:
        """Return the ranks that send no heartbeat for ``patience`` seconds; empty if all send one."""
        # One interval more: the last heartbeat of a lost rank may be that much older than this call.
        end = time.monotonic() + patience + _BEAT_SECONDS
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        lost: Silences = {}
        while time.monotonic() < end and not lost:
            time.sleep(_BEAT_SECONDS / 4)
            with self._lock:
                try:
                    lost = self._read_lost() or self._publish_lost(_at_least(self._silences(others), patience))
                except RuntimeError:
                    lost = _at_least(self._silence_of_store(), patience)
        if lost and self._rank == 0:
            # The other ranks read the result in the store, which ends with this process.
            time.sleep(2 * _BEAT_SECONDS)
        return lost

    def final_check(self, seconds: float) -> Silences:
        """Return the ranks that send no heartbeat within ``seconds``, except those that a signal has stopped as well.

        The launcher stops the ranks one after the other. Rank 0, which hosts the store, waits until all have checked.
        """
        end = time.monotonic() + seconds
        with self._lock:
            try:
                self._store.append(self._key("stopped"), f"{self._rank} ")
                if lost := self._read_lost():
                    return lost
                first = silent = self._counts(rank for rank in range(self._world_size) if rank != self._rank)
                while time.monotonic() < end and (silent or self._rank == 0):
                    time.sleep(_BEAT_SECONDS / 20)
                    self._read_stopped()
                    counts = self._counts(silent.keys() - self._stopped)
                    silent = {rank: count for rank, count in counts.items() if count == first[rank]}
                return self._publish_lost(dict.fromkeys(silent, seconds))
            except RuntimeError:
                return {} if 0 in self._stopped else self._silence_of_store()

    def _counts(self, ranks: Iterable[int]) -> dict[int, bytes]:
        return {rank: self._store.get(self._key(rank)) for rank in ranks}

    def _read_stopped(self) -> None:
        if self._store.check([self._key("stopped")]):
            self._stopped = {int(rank) for rank in self._store.get(self._key("stopped")).split()}

    def _send_heartbeat(self) -> None:
        self._count += 1
        self._store.set(self._key(self._rank), str(self._count))

    def _silences(self, ranks: list[int]) -> Silences:
        counts, now = self._store.multi_get([self._key(rank) for rank in ranks]), time.monotonic()
        self._store_answered = now
        for rank, count in zip(ranks, counts, strict=True):
            if rank not in self._seen or self._seen[rank][0] != count:
                self._seen[rank] = count, now
        return {rank: now - self._seen[rank][1] for rank in ranks}

    def _silence_of_store(self) -> Silences:
        # Rank 0 hosts the store, so an error there does not mean that another rank is lost.
        return {} if self._rank == 0 else {0: time.monotonic() - self._store_answered}

    def _publish_lost(self, lost: Silences) -> Silences:
        """Publish the lost ranks, so that all ranks name the same ones."""
        if lost:
            self._store.set(self._key("lost"), " ".join(f"{rank}:{seconds}" for rank, seconds in lost.items()))
        return lost

    def _read_lost(self) -> Silences:
        if not self._store.check([self._key("lost")]):
            return {}
        pairs = (part.split(":") for part in self._store.get(self._key("lost")).decode().split())
        return {int(rank): float(seconds) for rank, seconds in pairs}

    def _key(self, name: int | str) -> str:
        return f"{self._session}/{name}"


def _at_least(silences: Silences, seconds: float) -> Silences:
    return {rank: silence for rank, silence in silences.items() if silence >= seconds}
