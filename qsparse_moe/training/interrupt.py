"""SIGTERM and Ctrl-C as a wish that the loop grants between two steps."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

logger = logging.getLogger(__name__)


class CaughtSignals:
    """While it is entered, SIGINT and SIGTERM go to ``_caught``; what handled them before does so again afterwards.

    In another thread than the main one, where Python allows no handlers, signals keep their effect.
    """

    def __init__(self) -> None:
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._caught)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _caught(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopSignals(CaughtSignals):
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second Ctrl-C ends the process at once.

    Under the deepspeed launcher a Ctrl-C reaches a rank twice, from the terminal and as the launcher's SIGTERM, so
    SIGTERM never counts as the second. The launcher (0.19.8) kills a rank that is still there 30 s after its SIGTERM: a
    checkpoint must be written by then. Its outer process, ``deepspeed`` itself, passes SIGTERM on to nobody: send it to
    the process group, to ``deepspeed.launcher.launch`` below it, or to any one rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = 0
        """Number of the signal, 0 while there is none."""

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            logger.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)
        if number == signal.SIGINT:
            # Not a handler of ours: Python runs none while a collective waits for the other ranks.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
