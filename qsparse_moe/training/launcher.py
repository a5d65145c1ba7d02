"""``python -m qsparse_moe.training.launcher``: the deepspeed launcher, with the signals that should end a run handled.

It takes the arguments of ``deepspeed``. The launcher's own outer process (DeepSpeed 0.19.8) handles no signal on a
single node: Ctrl-C ends it with a traceback while the ranks still save, SIGTERM ends it without a word to the ranks,
and as the main process of a container, where a signal without a handler has no effect, it never ends. This process
passes the signal on to the inner launcher, which sends SIGTERM to the ranks, and stays until they have saved.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from qsparse_moe.training.launcher_watch import LAUNCHED, children, command_of

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The inner launcher kills after 30 s what is left; ranks that have lost it save by themselves.
_WAIT_SECONDS = 60.0


class Relay:
    """Passes SIGINT, SIGTERM and SIGUSR1 on to the inner launcher, as the SIGTERM that it handles."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal, 0 while there is none."""

    def catch(self) -> None:
        """Handle the signals from now on, except those that this process was started to ignore."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._caught)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        launched = [pid for pid in children() if LAUNCHED in command_of(pid)]
        if not launched:
            raise SystemExit(128 + number)
        for pid in launched:
            os.kill(pid, signal.SIGTERM)


def main() -> NoReturn:
    """Launch, and end with the launcher's exit code, or with 128 and the number of the signal that stopped the run."""
    relay = Relay()
    relay.catch()
    code = _launch()
    _wait_for_ranks()
    sys.exit(128 + relay.received if code and relay.received else code)


def _launch() -> int | str | None:
    # Signals are handled before the library is imported, which takes seconds.
    from deepspeed.launcher.runner import main as launch

    try:
        launch()
    except SystemExit as end:
        return end.code
    return 0


def _wait_for_ranks() -> None:
    """As the main process of a container, wait for ranks that have lost the inner launcher: they end with this one."""
    end = time.monotonic() + _WAIT_SECONDS
    while os.getpid() == 1 and time.monotonic() < end and any(map(_is_rank, children())):
        time.sleep(0.1)


def _is_rank(pid: int) -> bool:
    return any(word.startswith("--local_rank=") for word in command_of(pid))


if __name__ == "__main__":
    main()
