"""The command line: parse the arguments, call the verb, and turn an error into one message and an exit code.

Exit codes: 0 success; 2 the user's input is wrong; 1 any other error; 128 + N stopped by signal N.
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
from qsparse_moe.training.restarts import record_error
from qsparse_moe.version import __version__

PROGRAM = "qsparse-moe"
VERBS = (
    "init",
    "prepare",
    "train",
    "evaluate",
    "generate",
    "export",
    "import",
    "describe",
    "layout",
    "calibrate",
    "sensitivity",
    "allocate",
    "report",
    "ablate",
    "fit-law",
    "doctor",
    "bench",
    "tensorboard",
)
"""Each verb is a module of this package with ``register(app)``, ``_`` in place of ``-``. The modules import torch and
other heavy libraries only when the verb is called."""

# Some versions of typer contain click and others depend on it; this is the base of the usage errors in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The error numbers of a full disk and of an exhausted quota."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and end the process with its exit code."""
    # Signals are handled from here on, because a run may compile or wait for other ranks long before its first step.
    sys.exit(until_stopped(lambda: run(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one verb and return its exit code. An unexpected error is raised, with its traceback."""
    try:
        return _run(arguments)
    except Exception as error:
        record_error(f"{type(error).__name__}: {error}")
        raise


def _run(arguments: Sequence[str]) -> int:
    try:
        # Not standalone: click would print errors in its own form and end the process with its own exit codes.
        outcome = typer.main.get_command(build_app()).main(
            args=list(arguments), prog_name=PROGRAM, standalone_mode=False
        )
    except RankLost as error:  # every remaining rank has already reported it
        record_error(str(error))
        return 1
    except (QSparseMoEError, TrainingDiverged) as error:
        record_error(str(error))
        complain(str(error))
        return 2 if isinstance(error, QSparseMoEError) else 1
    except _UsageError as error:
        complain(_usage_message(error))
        return 2
    except OSError as error:
        # Any other OSError is a fault of this package, and its traceback is needed.
        if error.errno not in _FULL:
            raise
        # A full disk is the user's situation, whichever file it was; errors.naming has given the error its name.
        complain(_full_message(error))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        # 128 plus the number of SIGINT.
        complain("stopped by Ctrl-C")
        return 130
    # In this mode click returns the code of a typer.Exit, and otherwise whatever the verb returned.
    return outcome if isinstance(outcome, int) else 0


def build_app() -> typer.Typer:
    """Return the application with all its verbs."""
    app = typer.Typer(
        help="Train, measure, and ablate mixture-of-experts language models with Q-Sparse inside the experts.",
        add_completion=False,
        # Square brackets in a help text are no markup.
        rich_markup_mode=None,
        # The tracebacks of older versions of typer print local variables, which may be whole tensors.
        pretty_exceptions_enable=False,
    )
    # Without this, click would refuse --version and an empty command line, because they name no verb.
    app.callback(invoke_without_command=True)(_root)
    for verb in VERBS:
        # Every verb is registered on every call, since the help lists all of them; this is cheap because no module
        # imports torch.
        import_module(f"qsparse_moe.cli.{verb.replace('-', '_')}").register(app)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    # The deepspeed launcher puts --local_rank before the verb. The environment has the same value; that one is read.
    start_logging()
    if version:
        typer.echo(f"{PROGRAM} {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _full_message(error: OSError) -> str:
    place = error.filename or "a file or standard output"
    return f"{place}: cannot be written ({error.strerror}); free some space, or write to another disk"


def _usage_message(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else PROGRAM
    message: str = error.format_message()  # type: ignore[attr-defined]
    return f"{message.rstrip('.')} (see {command} --help)"
