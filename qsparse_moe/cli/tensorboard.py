"""``qsparse-moe tensorboard``: open run folders in TensorBoard."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qsparse_moe.errors import DataError

_DEFAULT = [Path("runs")]
# More than a run has: by default TensorBoard samples 10 images and 1000 points of a curve at random. 0 should mean all,
# but the pages of version 2.21 then request 0 samples and show none.
_SAMPLES = "scalars=100000,images=1000,histograms=1000,text=100"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("tensorboard")(tensorboard)


def tensorboard(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders that contain them.")] = _DEFAULT,
    port: Annotated[int, typer.Option(help="Port to serve on; 0: any free port.", min=0, max=65535)] = 6006,
    host: Annotated[
        str, typer.Option(help="Address to serve on; localhost is reachable from this machine only.")
    ] = "localhost",
    reload_interval: Annotated[int, typer.Option(help="Seconds between checks for new data.", min=1)] = 10,
) -> None:
    """Open the metrics of one or several folders in TensorBoard. Serves the page until Ctrl-C."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(_logdir(folders))]
    command += ["--host", host, "--port", str(port)]
    command += ["--reload_interval", str(reload_interval), "--samples_per_plugin", _SAMPLES]
    # Replace this process, so that a signal to it reaches the server, which prints the address of the page.
    os.execv(command[0], command)


def _logdir(folders: Sequence[Path]) -> Path:
    """Return a single folder of runs itself, so that new runs appear; else a new folder of links with short names.

    TensorBoard's own --logdir_spec would call the runs "NAME/." and read them with its slow reader. The links stay in
    the system's temporary folder: TensorBoard replaces this process, so no code is left to remove them.
    """
    for folder in folders:
        _check(folder)
    # Resolved and unique, so that a folder that is named twice is shown once.
    unique = list(dict.fromkeys(folder.resolve() for folder in folders))
    _check_apart(unique)
    if len(unique) == 1 and not _is_run(unique[0]):
        return unique[0]
    links = Path(tempfile.mkdtemp(prefix="qsparse-moe-tensorboard-"))
    for folder, name in zip(unique, short_names(unique), strict=True):
        (links / name).parent.mkdir(parents=True, exist_ok=True)
        (links / name).symlink_to(_events(folder))
    return links


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; name a run folder or a folder that contains run folders")
    # The search ends at the first file, because a folder of runs may hold thousands.
    if next(folder.rglob("*.tfevents.*"), None) is None:
        raise DataError(
            f"{folder} contains no metrics for TensorBoard; name a run folder or a folder of run folders, and train "
            "with metrics.tensorboard=true"
        )


def _check_apart(folders: Sequence[Path]) -> None:
    for outer in folders:
        for inner in folders:
            if outer in inner.parents:
                raise DataError(f"{inner} is inside {outer}, so its runs would be shown twice; leave one of them out")


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return a unique name for each folder: the smallest number of its last parts that distinguishes all of them."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        # The first part of an absolute path is "/", which would make the name of the link absolute.
        names = ["/".join(folder.parts[-length:]).lstrip("/") for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _is_run(folder: Path) -> bool:
    return (folder / "tensorboard").is_dir()


def _events(folder: Path) -> Path:
    """Return the folder to link: for a run its subfolder of event files, so that TensorBoard shows the run's name."""
    return folder / "tensorboard" if _is_run(folder) else folder
