"""Output of every verb: messages and logs on standard error from rank 0, results on standard output."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from qsparse_moe.errors import naming

# Wide enough for the tables if the output is a file or a pipe, which has no width.
_WIDTH_WITHOUT_TERMINAL = 120
# The launcher polls once per second and kills every rank once one has ended: rank 0 must have printed by then.
_PATIENCE_SECONDS = 3.0


def is_rank_zero() -> bool:
    """Return whether this process prints for all ranks of its launcher."""
    # The launcher's environment is read, because no process group exists yet when the options are checked.
    text = os.environ.get("RANK", "0")
    # With a RANK that is not a number, every process reports it: none can print for all.
    return not text.isdecimal() or int(text) == 0


def complain(message: str) -> None:
    """Print on standard error, once over all ranks, why the verb cannot continue."""
    if is_rank_zero():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_SECONDS)


def print_json(content: dict[str, Any]) -> None:
    """Print the JSON object of a verb with ``--json``; infinite values and NaN become null."""
    # JSON has no NaN or infinity; Python would write them as bare words that other parsers refuse.
    print(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a verb's result to ``file``, and create its folder; infinite values and NaN become null."""
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_console() -> Console:
    """Return the console for results: standard output."""
    # Markup is off, because brackets in the name of a folder are part of it.
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, markup=False)


def start_logging() -> None:
    """Send the log of this package to standard error: everything from rank 0, errors from the others."""
    logger = logging.getLogger("qsparse_moe")
    logger.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)
    # Whichever rank comes first tokenises or compiles, so only this rank has progress to log.
    for name in (
        "qsparse_moe.data.prepare",
        "qsparse_moe.data.table",
        "qsparse_moe.kernels.native",
        "qsparse_moe.training.engines.extension_builds",
    ):
        logging.getLogger(name).setLevel(logging.INFO)
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        logger.addHandler(_StandardError())


class _StandardError(logging.Handler):
    """Writes to the current ``sys.stderr``: a progress bar replaces it to keep log lines above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)
