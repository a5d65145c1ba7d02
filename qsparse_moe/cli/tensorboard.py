"""``qsparse-moe tensorboard``: open the run folders in TensorBoard."""

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
# As many as a run has: by itself TensorBoard draws 10 images and 1000 points of a curve at random. 0, which is said to
# keep all, shows none: the pages of 2.21 ask the reader for so many as are kept, and take 0 for none.
_SAMPLES = "scalars=100000,images=1000,histograms=1000,text=100"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("tensorboard")(tensorboard)


def tensorboard(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")] = _DEFAULT,
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.", min=0, max=65535)] = 6006,
    host: Annotated[str, typer.Option(help="Address to serve on; localhost is seen from here only.")] = "localhost",
    reload_interval: Annotated[int, typer.Option(help="Seconds between looks for new data.", min=1)] = 10,
) -> None:
    """Open the metrics of runs in TensorBoard, several folders side by side. Serves a page until Ctrl-C."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(_logdir(folders))]
    command += ["--host", host, "--port", str(port)]
    command += ["--reload_interval", str(reload_interval), "--samples_per_plugin", _SAMPLES]
    # In place of this process: a signal to it reaches the server, which says the page's address in one line.
    os.execv(command[0], command)


def _logdir(folders: Sequence[Path]) -> Path:
    """A folder of runs itself, where new ones are found; of all else a new folder of links with short names.

    TensorBoard's own --logdir_spec would call the runs "NAME/." and read them with its slow reader. The links stay in
    the system's temporary folder: TensorBoard takes the place of this process, so nobody is left to remove them.
    """
    for folder in folders:
        _check(folder)
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
        raise DataError(f"{folder} does not exist; name a run folder or the folder that holds them")
    if next(folder.rglob("*.tfevents.*"), None) is None:
        raise DataError(
            f"{folder} holds no metrics for TensorBoard; name a run folder or the folder that holds them, and run with "
            "metrics.tensorboard=true"
        )


def _check_apart(folders: Sequence[Path]) -> None:
    for outer in folders:
        for inner in folders:
            if outer in inner.parents:
                raise DataError(f"{inner} lies in {outer}, and its runs would be shown twice; leave one of them out")


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: as few of its last parts as tell all of them apart."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]).lstrip("/") for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _is_run(folder: Path) -> bool:
    return (folder / "tensorboard").is_dir()


def _events(folder: Path) -> Path:
    """Of a run, the folder below it in which only event files lie: the run's name then ends with its own."""
    return folder / "tensorboard" if _is_run(folder) else folder
