"""``--max_restarts N`` of the launcher: a run that failed is started again and continues from its newest checkpoint.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1

from qsparse_moe.config.load import load_config
from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.runs.folder import newest_step, run_folder

OPTION = "--max_restarts"
ERROR_FILE = "QSPARSE_MOE_ERROR_FILE"
"""Environment variable with the file to which every rank appends the error that ends it."""

_INPUT_IS_WRONG = 2
_STOPPED = {128 + number for number in (SIGINT, SIGTERM, SIGUSR1)}

Attempt = Callable[[Sequence[str], Mapping[str, str]], int]
"""Runs the launcher with arguments and additional environment variables, and returns its exit code."""


def take_max_restarts(arguments: Sequence[str]) -> tuple[list[str], int]:
    """Return the arguments without ``--max_restarts N``, and N; 0 if it is not given.

    Raises:
        ConfigError: N is missing or is not a whole number.
    """
    for index, argument in enumerate(arguments):
        # Everything after the module belongs to it.
        if argument == "--module":
            break
        name, has_value, value = argument.partition("=")
        if name == OPTION:
            used = 1 if has_value else 2
            value = value if has_value else "".join(arguments[index + 1 : index + 2])
            if not (value.isascii() and value.isdecimal()):
                raise ConfigError(
                    f"{OPTION} ({show(value)}) must be a whole number: how often a failed run is restarted"
                )
            return [*arguments[:index], *arguments[index + used :]], int(value)
    return list(arguments), 0


def run_with_restarts(arguments: Sequence[str], max_restarts: int, attempt: Attempt) -> int:
    """Run ``attempt`` until the run ends or may not be restarted; return the last exit code.

    A run is restarted after a failure, at most ``max_restarts`` times, and only while it makes progress: a run that
    fails twice with the same newest checkpoint would do so again. It is not restarted if a signal has stopped it, or if
    its input is wrong, which the message of the run says.

    Args:
        arguments: those of the launcher; the module must be ``qsparse_moe`` and its verb ``train``.
        max_restarts: maximum number of restarts.
        attempt: runs the launcher once.

    Raises:
        ConfigError: the command is not ``train``, or its config is wrong.
    """
    config = _config_of(arguments)
    folder = run_folder(config)
    failed_at: list[int | None] = []
    while True:
        again = [*arguments, "training.resume=true"] if failed_at else arguments
        code, reason = _attempt(again, attempt)
        step = newest_step(folder)
        # DeepSpeed's launcher also exits with 0 if its inner process is killed.
        is_finished = code == 0 and step is not None and step >= config.training.steps
        if is_finished or code == _INPUT_IS_WRONG or code in _STOPPED:
            return code
        code = code or 1
        failed_at.append(step)
        number = len(failed_at)
        where = _place(folder, failed_at[-1])
        what = f"the run ended with exit code {code}{reason}, {where}"
        if number > 1 and failed_at[-1] == failed_at[-2]:
            _say(f"not restarted: {what}, as before restart {number - 1}; it would fail there again")
            return code
        if number > max_restarts:
            _say(f"not restarted: {what}, and {OPTION} is {max_restarts}")
            return code
        _say(f"restart {number} of at most {max_restarts}: {what}")


def record_error(message: str) -> None:
    """Append the error that ends this rank to the file that ``ERROR_FILE`` names, if a launcher has set it."""
    if file := os.environ.get(ERROR_FILE):
        line = f"rank {os.environ.get('RANK', '0')}: {' '.join(message.split())}\n"
        # One write in append mode: several ranks share the file.
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(line)


def _config_of(arguments: Sequence[str]) -> RunConfig:
    words = list(arguments)
    module = words.index("--module") if "--module" in words else len(words)
    command = words[module + 1 :]
    if command[:2] != ["qsparse_moe", "train"] or len(command) < 3:
        raise ConfigError(
            f"{OPTION} restarts runs of: --module qsparse_moe train CONFIG, and the command is "
            f"{show(' '.join(command))}; remove {OPTION}, or give that command"
        )
    values = [word for word in command[2:] if not word.startswith("-")]
    return load_config(Path(values[0]), values[1:])


def _attempt(arguments: Sequence[str], attempt: Attempt) -> tuple[int, str]:
    """Run the launcher once; return its exit code and the first error that a rank has recorded, as part of a line."""
    with tempfile.TemporaryDirectory(prefix="qsparse_moe-") as folder:
        file = Path(folder) / "errors.txt"
        code = attempt(arguments, {ERROR_FILE: str(file)})
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return code, f" ({lines[0]})" if lines else " (no rank has named an error)"


def _place(folder: Path, step: int | None) -> str:
    return (
        f"and {folder} has no checkpoint"
        if step is None
        else f"and the newest checkpoint in {folder} is of step {step}"
    )


def _say(line: str) -> None:
    print(f"qsparse_moe: {line}", file=sys.stderr, flush=True)
