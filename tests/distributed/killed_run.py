"""The command line for ``random_kills``: it records what it begins, and pauses where it may be killed."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

RANK = os.environ.get("RANK", "0")


def note(moment: str) -> None:
    """Append a line in one write, so that lines of several processes do not mix."""
    with open(os.environ["KILLED_RUN_MOMENTS"], "a") as file:
        file.write(f"{moment} {RANK} {os.getpid()}\n")


def noted(moment: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """``work``, written down by rank 0 as it begins, with a pause before and after it."""

    @functools.wraps(work)
    def call(*arguments: Any, **named: Any) -> Any:
        if RANK == "0":
            note(moment)
        pause()
        result = work(*arguments, **named)
        pause()
        return result

    return call


def pause() -> None:
    """Pause, so that a kill hits this moment, in a run that may be killed."""
    if os.environ["KILLED_RUN_SLOW"]:
        time.sleep(0.02)


def main() -> None:
    """Run the verb."""
    note("start")
    from qsparse_moe.kernels import native
    from qsparse_moe.training import loop
    from qsparse_moe.training.checkpoint import save as checkpoint
    from qsparse_moe.training.evaluate import Evaluator

    loop.train_step = noted("step", loop.train_step)
    # From the copy of the state to the rename, in the background: steps go on, and a kill meets both.
    writer = checkpoint.CheckpointWriter
    writer.save = noted("save", writer.save)  # type: ignore[method-assign]
    writer._write = noted("write", writer._write)  # type: ignore[method-assign]
    # Each file of a checkpoint goes to the disk by itself: there are moments between them.
    flush = os.fsync

    def flush_slowly(file: int) -> None:
        pause()
        flush(file)

    os.fsync = flush_slowly
    Evaluator.__call__ = noted("evaluation", Evaluator.__call__)  # type: ignore[method-assign]
    compile_operators = native._compile

    def compile_noted(library: native.Library, folder: Path) -> Path:
        note("compile")
        return compile_operators(library, folder)

    native._compile = compile_noted

    from qsparse_moe.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
