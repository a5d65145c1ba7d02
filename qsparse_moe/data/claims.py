"""Claims: which of several builders, perhaps on several machines, makes a part of a folder.

A claim is a small file that only one builder can create (``O_EXCL``), with its name and a heartbeat in it. Locks of the
operating system are not used, because network file systems do not all have them. A claim only saves work: two builders
of the same part make the same files twice, and one of them renames its own into place. It may therefore be taken over
freely from a builder that is gone or silent.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_BEAT_SECONDS = 5.0
# Network file systems show a change some seconds late, and a machine may be suspended for a moment.
_SILENT_SECONDS = 60.0


class Claim:
    """A claim of this process, with a thread that renews it until the end of the ``with`` block, which removes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            # Two threads of one process may build, in tests or in a notebook.
            "builder": f"{os.getpid()}-{time.time_ns()}",
        }
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if _read(self._path).get("builder") == self._own["builder"]:
            with suppress(OSError):
                self._path.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            # Without a heartbeat another builder takes over, which costs work and nothing else.
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        self._beats += 1
        partial = self._path.with_name(f".{self._path.name}.{self._own['builder']}")
        partial.write_text(json.dumps(self._own | {"beats": self._beats}), encoding="utf-8")
        partial.rename(self._path)


class Claims:
    """The claims in a folder, as one builder knows them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[dict[str, Any], float]] = {}

    def take(self, name: str) -> Claim | None:
        """Return a claim on ``name``, to be entered; None if another builder has it, and shows that it lives."""
        path = self._path(name)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            if not self._is_abandoned(name):
                return None
        return Claim(path)

    def holder(self, name: str) -> str:
        """Return who has the claim on ``name``, for messages."""
        found = _read(self._path(name))
        if not found:
            return "another process"
        return f"process {found['process']} on {found['host']} since {found['since']}"

    def _is_abandoned(self, name: str) -> bool:
        found = _read(self._path(name))
        if found.get("host") == socket.gethostname() and not _lives(int(found["process"])):
            return True
        before, since = self._known.get(name, (None, 0.0))
        if found != before:
            self._known[name] = found, time.monotonic()
            return False
        return time.monotonic() - since > _SILENT_SECONDS

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.claim"


def _read(path: Path) -> dict[str, Any]:
    """Return the contents of a claim; empty while its maker has only created it, or if it is gone."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _lives(process: int) -> bool:
    # Signal 0 is not delivered; it only tests whether the process exists.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True
