"""The command line: parse, call the verb, turn what went wrong into one message and an exit code.

0 done; 2 the user's input is wrong; 1 anything else; 128 + N stopped by signal N.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from qsparse_moe.cli.console import complain, start_logging
from qsparse_moe.errors import QSparseMoEError, RankLost, TrainingDiverged
from qsparse_moe.training.interrupt import until_stopped
from qsparse_moe.version import __version__

PROGRAM = "qsparse-moe"
VERBS = (
    "init",
    "train",
    "evaluate",
    "generate",
    "export",
    "describe",
    "calibrate",
    "sensitivity",
    "allocate",
    "ablate",
    "fit-law",
    "doctor",
    "bench",
    "tensorboard",
)
"""Each is a module of this room, ``_`` for ``-``, with ``register(app)``. They import torch and the like only when they
are called."""

# typer carries click inside or depends on it, as its version goes; this is the base of its usage errors in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk without room, and of a user's share of one."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and end the process with its exit code."""
    sys.exit(until_stopped(lambda: run(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one verb; its exit code. What is no known situation of a user is raised, with its traceback."""
    try:
        outcome = typer.main.get_command(build_app()).main(
            args=list(arguments), prog_name=PROGRAM, standalone_mode=False
        )
    except RankLost:  # every rank that is left has said it
        return 1
    except (QSparseMoEError, TrainingDiverged) as error:
        complain(str(error))
        return 2 if isinstance(error, QSparseMoEError) else 1
    except _UsageError as error:
        complain(_usage_message(error))
        return 2
    except OSError as error:
        if error.errno not in _FULL:
            raise
        complain(_full_message(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        complain("stopped by Ctrl-C")
        return 130
    return outcome if isinstance(outcome, int) else 0


def build_app() -> typer.Typer:
    """The application with all its verbs."""
    app = typer.Typer(
        help="Train, see and run mixture-of-experts language models with Q-Sparse inside the experts.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_root)
    for verb in VERBS:
        import_module(f"qsparse_moe.cli.{verb.replace('-', '_')}").register(app)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    # The deepspeed launcher puts --local_rank before the verb; the environment says the same, and that is read.
    start_logging()
    if version:
        typer.echo(f"{PROGRAM} {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _full_message(error: OSError) -> str:
    place = error.filename or "a file or standard output"
    return f"{place}: cannot be written ({error.strerror}); it needs free space. Make room, or name a place with some"


def _usage_message(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else PROGRAM
    message: str = error.format_message()  # type: ignore[attr-defined]
    return f"{message.rstrip('.')} (see {command} --help)"
