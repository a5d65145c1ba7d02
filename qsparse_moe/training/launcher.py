"""``python -m qsparse_moe.training.launcher``: the deepspeed launcher with handlers for the signals that end a run.

It takes the arguments of ``deepspeed``. The launcher's outer process (DeepSpeed 0.19.8) handles no signals on a single
node: Ctrl-C ends it with a traceback while the ranks still save, SIGTERM ends it without notifying the ranks, and as
the main process of a container, where a signal without a handler has no effect, it never ends. This process forwards
the signal to the inner launcher, which sends SIGTERM to the ranks, and waits until they have saved.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from qsparse_moe.training.launcher_monitor import LAUNCHED, children, command_of

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Twice the 30 s after which the inner launcher kills the ranks; ranks that have lost it save by themselves.
_WAIT_SECONDS = 60.0


class Relay:
    """Forwards SIGINT, SIGTERM, and SIGUSR1 to the inner launcher as SIGTERM, the only one that it handles."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal, 0 before there is one."""

    def catch(self) -> None:
        """Install the handlers, except for signals that this process was started to ignore, as by ``nohup``."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._caught)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        launched = [pid for pid in children() if LAUNCHED in command_of(pid)]
        if not launched:
            # The inner launcher has not been started, or has ended: there is no rank to wait for.
            raise SystemExit(128 + number)
        for pid in launched:
            os.kill(pid, signal.SIGTERM)


def main() -> NoReturn:
    """Launch the ranks; exit with the launcher's code, or with 128 plus the signal that ended the run."""
    relay = Relay()
    relay.catch()
    code = _launch()
    # The outer launcher returns when the inner one has ended, which may be before the ranks have.
    _wait_for_ranks()
    sys.exit(128 + relay.received if code and relay.received else code)


def _launch() -> int | str | None:
    # Imported only after the handlers are installed, because it takes seconds.
    from deepspeed.launcher.runner import main as launch

    try:
        launch()
    except SystemExit as end:
        return end.code
    return 0


def _wait_for_ranks() -> None:
    """Wait for ranks without the inner launcher if this is a container's main process, which they end with."""
    end = time.monotonic() + _WAIT_SECONDS
    while os.getpid() == 1 and time.monotonic() < end and any(map(_is_rank, children())):
        time.sleep(0.1)


def _is_rank(pid: int) -> bool:
    return any(word.startswith("--local_rank=") for word in command_of(pid))


if __name__ == "__main__":
    main()
