"""``python -m qsparse_moe VERB``, the same as ``qsparse-moe VERB``; the deepspeed launcher starts ranks this way."""

import sys
from typing import NoReturn

from qsparse_moe.training.interrupt import until_stopped


def main() -> NoReturn:
    """Run the verb of the command line and end the process with its exit code, or with that of a signal."""
    sys.exit(until_stopped(_run))


def _run() -> int:
    # Signals are handled before the command line and its libraries are imported.
    from qsparse_moe.cli.app import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    main()
