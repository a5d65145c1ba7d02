"""Log what the program waits for if the hub answers late or not at all."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SILENT_SECONDS = 2.0
"""Longest wait without a log line."""


@contextlib.contextmanager
def log_slow_wait(what: str) -> Iterator[None]:
    """Log ``waiting for <what>`` if the work inside takes longer than ``SILENT_SECONDS``."""
    # A timer thread, because the hub's client may retry for minutes without returning.
    timer = threading.Timer(
        SILENT_SECONDS,
        logger.warning,
        ("waiting for %s; without a network, set HF_HUB_OFFLINE=1 to use what the hub's cache holds at once", what),
    )
    # A daemon, so that an interrupted process need not wait for it.
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
