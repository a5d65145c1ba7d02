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
def says_what_it_waits_for(what: str) -> Iterator[None]:
    """Log ``waiting for <what>`` where the work inside takes longer than two seconds."""
    timer = threading.Timer(
        SILENT_SECONDS,
        logger.warning,
        ("waiting for %s; without a network, HF_HUB_OFFLINE=1 takes what the hub's cache holds, at once", what),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
