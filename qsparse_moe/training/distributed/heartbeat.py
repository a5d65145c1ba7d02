"""Notices that another rank has died, says which, and ends this one instead of waiting for it for ever.

Every rank gives a sign of life in the launcher's store and looks at that of the next one: a few small messages a beat,
whatever the number of ranks. Gloo's collectives fail as soon as a peer's connection closes, without the peer's name;
NCCL's, and those of a machine that is gone, only hang. In both cases the store tells whose signs have stopped.
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
from qsparse_moe.training.interrupt import EndingAlready, Stopped, is_told_to_stop

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
# After a collective has failed: whoever gives no sign for so long is gone. The launcher gives a rank 30 s to end.
_PATIENCE_SECONDS = 8.0
# After SIGTERM, which the launcher sends to the others when a rank has died; it kills them 30 s later.
_STOPPING_SECONDS = 15.0
# Three beats, where SIGTERM ends this process at once: that it must do within 4 s.
_LAST_LOOK_SECONDS = 3.0
# What the main thread gets to end by itself once a rank is known to be gone, before the process is ended for it.
_GRACE_SECONDS = 5.0

Silences = dict[int, float]
"""Seconds since the last sign of life, by rank."""


class RankWatch:
    """Watches the other ranks while it is entered; a rank alone has nothing to watch.

    On the way out ``RankLost`` takes the place of the error that a collective raised because a rank is gone. Where the
    collective hangs instead, the process is ended, with the same message, ``timeout`` seconds after the last sign.
    """

    def __init__(self, distributed: Distributed, *, timeout: float, way_out: Callable[[], str]) -> None:
        """``way_out()`` is what a message ends with."""
        self._distributed = distributed
        self._timeout = timeout
        self._way_out = way_out
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._heartbeats: Heartbeats | None = None
        self._signals = EndingAlready()

    def __enter__(self) -> RankWatch:
        if self._distributed.world_size > 1:
            self._heartbeats = Heartbeats(self._distributed)
            self._thread = threading.Thread(
                target=self._watch, args=(self._heartbeats,), name="rank-watch", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            self._name_lost(error)
            self._end_watch()
            return
        failure = error or self._wait_for_all()
        try:
            message = self._explain(failure) if failure is not None else None
        finally:
            self._signals.release()
        self._end_watch()
        if message is not None:
            # By every rank that is left: rank 0, which else speaks for all, may be the one that is gone.
            logger.error("%s", message)
            raise RankLost(message) from failure
        if error is None and failure is not None:
            raise failure

    def expect_end(self, error: BaseException) -> None:
        """Let signals wait until the lost rank is named, if a collective raised ``error``; the way out calls it too.

        Whoever has something to do between the error and the way out calls it before.
        """
        if self._heartbeats is not None and is_of_a_collective(error):
            self._signals.catch()

    def _end_watch(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * _BEAT_SECONDS)

    def _name_lost(self, stopped: Stopped) -> None:
        """Say which ranks are gone, if any: the launcher sends SIGTERM to those that are left when one is."""
        if self._heartbeats is not None and stopped.number == signal.SIGTERM:
            lost = self._heartbeats.last_look(_LAST_LOOK_SECONDS)
            if lost:
                logger.error("%s", self._message(self._heartbeats, lost))

    def _wait_for_all(self) -> BaseException | None:
        """Leave together: whoever gives no sign because its work is done must not be taken for lost."""
        try:
            self._distributed.barrier()
        except RuntimeError as failure:
            return failure
        return None

    def _explain(self, error: BaseException) -> str | None:
        """What the user should know of an error that a collective raised; None for any other error."""
        if self._heartbeats is None or not is_of_a_collective(error):
            return None
        self.expect_end(error)
        lost = self._heartbeats.wait_for_lost(_PATIENCE_SECONDS)
        if lost:
            return self._message(self._heartbeats, lost)
        if "timed out" in str(error).lower():
            return (
                f"a collective did not end within training.collective_timeout ({self._timeout:g} s), though every rank "
                f"gives signs of life: one is stuck, or needs longer. Raise the setting if it does. {self._way_out()}"
            )
        return None

    def _watch(self, signs: Heartbeats) -> None:
        """Until told to stop: give a sign, and look at the next rank; end the process when a rank is gone."""
        while not self._stop.wait(_BEAT_SECONDS):
            # A collective may hang though it will never end: the wish to stop is then noted, and nobody acts on it.
            lost = signs.beat(min(self._timeout, _STOPPING_SECONDS) if is_told_to_stop() else self._timeout)
            if lost and not self._stop.wait(_GRACE_SECONDS):
                # The main thread hangs in a collective that nothing can end.
                print(self._message(signs, lost), file=sys.stderr, flush=True)
                os._exit(1)

    def _message(self, signs: Heartbeats, lost: Silences) -> str:
        names = ", ".join(f"rank {rank} ({signs.name_of(rank)})" for rank in sorted(lost))
        return (
            f"{names}, of {self._distributed.world_size} ranks, gave no sign of life for {max(lost.values()):.0f} s: "
            f"killed, or its machine is gone. Rank {self._distributed.rank} ends too. {self._way_out()}"
        )


def is_of_a_collective(error: BaseException) -> bool:
    """Whether a collective or the store raised it: NCCL's errors have a type, gloo's only their text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Heartbeats:
    """Counters in the launcher's store, one a rank. The store lives in rank 0: when it is silent, so is rank 0."""

    def __init__(self, distributed: Distributed) -> None:
        """Every rank calls it."""
        self._rank, self._world_size = distributed.rank, distributed.world_size
        # A connection of its own: the other one may be waiting for something.
        self._store = launcher_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=_PATIENCE_SECONDS))
        self._lock = threading.Lock()
        self._names = distributed.gather(f"process {os.getpid()} on {socket.gethostname()}")
        self._session = distributed.share((f"signs-{time.time_ns()}", None) if self._rank == 0 else None)
        self._count = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._store_answered = time.monotonic()
        self._stopped: set[int] = set()
        self._send_heartbeat()
        distributed.barrier()

    def name_of(self, rank: int) -> str:
        """Process and machine of a rank."""
        return self._names[rank]

    def beat(self, timeout: float) -> Silences:
        """Give a sign and look at the next rank; the ranks that are gone, by ``timeout`` or by another's word."""
        following = (self._rank + 1) % self._world_size
        with self._lock:
            try:
                self._send_heartbeat()
                self._read_stopped()
                return self._read_lost() or self._publish_lost(_longer(self._silences([following]), timeout))
            except RuntimeError:
                return _longer(self._silence_of_store(), timeout)

    def wait_for_lost(self, patience: float) -> Silences:
        """The ranks that give no sign for ``patience`` seconds from now; empty if all do."""
        end = time.monotonic() + patience + _BEAT_SECONDS
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        lost: Silences = {}
        while time.monotonic() < end and not lost:
            time.sleep(_BEAT_SECONDS / 4)
            with self._lock:
                try:
                    lost = self._read_lost() or self._publish_lost(_longer(self._silences(others), patience))
                except RuntimeError:
                    lost = _longer(self._silence_of_store(), patience)
        if lost and self._rank == 0:
            # The others read it in the store, which ends with this process.
            time.sleep(2 * _BEAT_SECONDS)
        return lost

    def last_look(self, seconds: float) -> Silences:
        """Return the ranks that give no sign within ``seconds``, except those that a signal has stopped too.

        The launcher stops the ranks one after the other: rank 0, which holds the store, stays until all know of it.
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
        return {} if self._rank == 0 else {0: time.monotonic() - self._store_answered}

    def _publish_lost(self, lost: Silences) -> Silences:
        """Let every rank know, so that all name the same."""
        if lost:
            self._store.set(self._key("lost"), " ".join(f"{rank}:{seconds}" for rank, seconds in lost.items()))
        return lost

    def _read_lost(self) -> Silences:
        if not self._store.check([self._key("lost")]):
            return {}
        pairs = (part.split(":") for part in self._store.get(self._key("lost")).decode().split())
        return {int(rank): float(seconds) for rank, seconds in pairs}

    def _key(self, what: int | str) -> str:
        return f"{self._session}/{what}"


def _longer(silences: Silences, seconds: float) -> Silences:
    return {rank: silence for rank, silence in silences.items() if silence >= seconds}
