"""``python -m qsparse_moe.training.launcher``: the deepspeed launcher with handlers for the signals that end a run.

It takes the arguments of ``deepspeed``. The launcher's outer process (DeepSpeed 0.19.8) handles no signals on a single
node: Ctrl-C ends it with a traceback while the ranks still save, SIGTERM ends it without notifying the ranks, and as
the main process of a container, where a signal without a handler has no effect, it never ends. This process forwards
the signal to the inner launcher, which sends SIGTERM to the ranks, and waits until they have saved.

With ``--max_restarts N`` a run that fails is started again; see ``restarts``. Each attempt is a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from qsparse_moe.errors import ConfigError
from qsparse_moe.training.launcher_monitor import LAUNCHED, children, command_of

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Twice the 30 s after which the inner launcher kills the ranks; ranks that have lost it save by themselves.
_WAIT_SECONDS = 60.0
_THIS_MODULE = "qsparse_moe.training.launcher"


class Relay:
    """Forwards SIGINT, SIGTERM, and SIGUSR1 to the launcher below as SIGTERM, which every launcher handles."""

    def __init__(self, module: str = LAUNCHED) -> None:
        """Args: ``module`` is that of the launcher below, as in its command line."""
        self._module = module
        self.received = 0
        """Number of the first signal, 0 before there is one."""

    def catch(self) -> None:
        """Install the handlers, except for signals that this process was started to ignore, as by ``nohup``."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._caught)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        launched = [pid for pid in children() if self._module in command_of(pid)]
        if not launched:
            # The launcher below has not been started, or has ended: there is no rank to wait for.
            raise SystemExit(128 + number)
        for pid in launched:
            os.kill(pid, signal.SIGTERM)


def main() -> NoReturn:
    """Launch the ranks; exit with the launcher's code, or with 128 plus the signal that ended the run."""
    # Imported here, because it reads configs, which takes a moment that signals need not wait for.
    from qsparse_moe.training.restarts import run_with_restarts, take_max_restarts

    try:
        sys.argv[1:], max_restarts = take_max_restarts(sys.argv[1:])
        relay = Relay(_THIS_MODULE if max_restarts else LAUNCHED)
        relay.catch()
        code = run_with_restarts(sys.argv[1:], max_restarts, _launch_below) if max_restarts else _launch()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # The outer launcher returns when the inner one has ended, which may be before the ranks have.
    _wait_for_ranks()
    sys.exit(128 + relay.received if code and relay.received else code)


def _launch_below(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run this launcher without restarts in a process of its own, and return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", _THIS_MODULE, *arguments], env=os.environ | variables)
    code = process.wait()
    # As a shell reports a process that a signal has killed.
    return code if code >= 0 else 128 - code


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
