"""Print whether a run is finished, and its folder, for launch/quickstart.sh.

``python launch/run_state.py CONFIG [OVERRIDES]`` exits with code 2 and one message if a setting is wrong or
the folder belongs to another run.
"""

from __future__ import annotations

import sys

from qsparse_moe.config.load import load_config
from qsparse_moe.errors import QSparseMoEError
from qsparse_moe.runs.folder import is_finished, run_folder


def main(arguments: list[str]) -> int:
    """Print ``finished FOLDER`` or ``unfinished FOLDER``; return the exit code."""
    try:
        config = load_config(arguments[0], arguments[1:])
        print("finished" if is_finished(config) else "unfinished", run_folder(config))
    except QSparseMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
