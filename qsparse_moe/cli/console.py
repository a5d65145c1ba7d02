"""What every verb prints with: messages and logs on standard error from rank 0, results on standard output."""

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

# Wide enough for the tables where the output is a file or a pipe, whose width nobody knows.
_WIDTH_WITHOUT_TERMINAL = 120
# The launcher ends every rank once one has ended, and looks once a second: rank 0 must have spoken by then.
_PATIENCE_SECONDS = 3.0


def is_rank_zero() -> bool:
    """Whether this process speaks for all ranks of its launcher."""
    text = os.environ.get("RANK", "0")
    # What is no number is said by whoever has it: no rank could speak for all.
    return not text.isdecimal() or int(text) == 0


def complain(message: str) -> None:
    """Say on standard error, once over all ranks, why the verb cannot go on."""
    if is_rank_zero():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_SECONDS)


def print_json(content: dict[str, Any]) -> None:
    """The one JSON object of a verb with ``--json``; what is infinite or no number becomes null."""
    print(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a verb's result into ``file``, and make the folder that it is in."""
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_console() -> Console:
    """Where results go: standard output."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, markup=False)


def start_logging() -> None:
    """Send this package's log to standard error: everything from rank 0, errors from the others."""
    logger = logging.getLogger("qsparse_moe")
    logger.setLevel(logging.INFO if is_rank_zero() else logging.ERROR)
    # Whichever rank comes first tokenises or compiles, and it alone has something to say about that.
    for name in (
        "qsparse_moe.data.table",
        "qsparse_moe.kernels.native",
        "qsparse_moe.training.engines.extension_builds",
    ):
        logging.getLogger(name).setLevel(logging.INFO)
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        logger.addHandler(_StandardError())


class _StandardError(logging.Handler):
    """Writes to what ``sys.stderr`` is at that moment: a progress bar puts itself there to keep lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)
