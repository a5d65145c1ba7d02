"""``qsparse-moe tensorboard``: open the run folders in TensorBoard."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qsparse_moe.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("tensorboard")(tensorboard)


def tensorboard(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder of them.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.", min=0, max=65535)] = 6006,
) -> None:
    """Open the metrics of runs in TensorBoard. Serves a page until Ctrl-C."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; name a run folder or the folder that holds them")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    # In place of this process: a signal to it reaches the server.
    os.execv(command[0], command)
