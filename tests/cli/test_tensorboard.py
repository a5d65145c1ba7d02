"""The verb that opens TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qsparse_moe.cli import tensorboard
from qsparse_moe.cli.app import run


@pytest.fixture
def make_run(tmp_path):
    """Make a run folder with TensorBoard's files alone, since nothing else matters here."""

    def make(name):
        events = tmp_path / name / "tensorboard"
        events.mkdir(parents=True)
        (events / "events.out.tfevents.1.host").touch()
        return events.parent

    return make


@pytest.fixture
def started(monkeypatch, tmp_path_factory):
    """The commands that would have taken the place of this process."""
    commands = []
    monkeypatch.setattr(tensorboard.tempfile, "tempdir", str(tmp_path_factory.mktemp("links")))
    monkeypatch.setattr(tensorboard.os, "execv", lambda program, command: commands.append((program, command)))
    return commands


def option(started, name):
    ((program, command),) = started
    assert program == sys.executable and command[:3] == [sys.executable, "-m", "tensorboard.main"]
    return command[command.index(name) + 1] if name in command else None


def test_a_folder_of_runs_is_searched_by_tensorboard_itself_with_every_sample_kept(tmp_path, make_run, started):
    make_run("first")
    assert run(["tensorboard", str(tmp_path), "--port", "0", "--reload-interval", "3"]) == 0
    given = {name: option(started, f"--{name}") for name in ("logdir", "host", "port")}
    assert given == {"logdir": str(tmp_path), "host": "localhost", "port": "0"}
    assert option(started, "--reload_interval") == "3"
    assert option(started, "--samples_per_plugin") == "scalars=100000,images=1000,histograms=1000,text=100"


def links(started):
    folder = Path(option(started, "--logdir"))
    return {str(path.relative_to(folder)): path.resolve() for path in folder.rglob("*") if path.is_symlink()}


def test_several_folders_get_short_names(make_run, started):
    first, grid = make_run("first"), make_run("grid/one").parent
    assert run(["tensorboard", str(first), str(grid), str(first)]) == 0
    assert links(started) == {"first": first / "tensorboard", "grid": grid}


def test_a_single_run_keeps_its_name(make_run, started):
    first = make_run("first")
    assert run(["tensorboard", str(first)]) == 0
    assert links(started) == {"first": first / "tensorboard"}


def test_runs_of_the_same_name_are_distinguished_by_their_parent_folders(make_run, started):
    runs = {name: make_run(name) for name in ("a/tiny", "b/tiny", "b/small")}
    assert run(["tensorboard", *map(str, runs.values())]) == 0
    assert links(started) == {name: folder / "tensorboard" for name, folder in runs.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none does not exist; name a run folder"),
        (["empty"], "empty contains no metrics for TensorBoard; name a run folder"),
        (["grid", "grid/one"], "so its runs would be shown twice; leave one of them out"),
    ],
)
def test_folders_that_cannot_be_shown_are_refused(tmp_path, make_run, started, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    for name in ("first", "grid/one"):
        make_run(name)
    assert run(["tensorboard", *(str(tmp_path / name) for name in arguments)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not started
