"""What the ranks' background threads report to rank 0 through the launcher's store, without a collective."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from qsparse_moe.training.distributed.ranks import Distributed, launcher_store

_POLL_SECONDS = 0.02
# The store of a lost rank 0 does not answer, and the process must then end soon.
_TIMEOUT_SECONDS = 8.0


class RankReports:
    """One report per rank and key; every rank sends its report, and rank 0 collects them all."""

    def __init__(self, distributed: Distributed) -> None:
        self._rank, self._world_size = distributed.rank, distributed.world_size
        if self._world_size > 1:
            # A separate connection: another thread may hold its own in a blocking call.
            self._store = launcher_store().clone()  # type: ignore[attr-defined]
            self._store.set_timeout(timedelta(seconds=_TIMEOUT_SECONDS))

    def send(self, key: str, report: dict[str, Any]) -> None:
        """Send the report of a rank other than 0; if rank 0 is lost, it is dropped."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{key}/{self._rank}", json.dumps(report))

    def collect(self, key: str, own: dict[str, Any], *, gives_up: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """Return the reports by rank, ``own`` first; None if ``gives_up`` returns True before all are there."""
        reports = [own]
        try:
            for rank in range(1, self._world_size):
                name = f"{key}/{rank}"
                while not self._store.check([name]):
                    if gives_up():
                        return None
                    time.sleep(_POLL_SECONDS)
                reports.append(json.loads(self._store.get(name)))
                self._store.delete_key(name)
        except RuntimeError:  # The store is gone, and with it this process's group.
            return None
        return reports
