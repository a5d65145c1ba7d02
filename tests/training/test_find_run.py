"""Folders that a user names: which kind each is, and the runs that a wrong name is answered with."""

from __future__ import annotations

import pytest

from qsparse_moe.errors import CheckpointError
from qsparse_moe.runs.find import find_model, find_run


def make(folder, *files):
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).write_text("")
    return folder


def test_a_run_a_checkpoint_and_an_export_are_told_apart(tmp_path, monkeypatch):
    run = make(tmp_path / "runs" / "a", "config.yaml")
    checkpoint = make(run / "checkpoints" / "step-00000004", "state.json")
    export = make(tmp_path / "export", "config.yaml", "model-00001-of-00002.safetensors")
    found = {path: find_model(path) for path in (run, checkpoint, export)}
    assert [found[path].kind for path in (run, checkpoint, export)] == ["run", "checkpoint", "export"]
    assert [found[path].config_folder for path in (run, checkpoint, export)] == [run, run, export]
    monkeypatch.chdir(checkpoint.parent)
    inside = find_model(checkpoint.relative_to(checkpoint.parent))
    assert (inside.kind, inside.config_folder) == ("checkpoint", run)
    # A folder with an index elsewhere is no checkpoint.
    assert find_model(make(tmp_path / "other", "state.json", "config.yaml")).kind == "run"


def test_a_checkpoint_without_its_run_is_refused(tmp_path):
    lonely = make(tmp_path / "a" / "checkpoints" / "step-00000004", "state.json")
    with pytest.raises(CheckpointError, match="a is not a run folder: it contains no config.yaml"):
        find_model(lonely)


@pytest.mark.parametrize("name", [".saving-step-00000004-1f2e3d4c", ".deleting-step-00000004", "step-00000004"])
def test_a_checkpoint_that_another_run_is_writing_is_refused(tmp_path, name):
    run = make(tmp_path / "a", "config.yaml")
    make(run / "checkpoints" / ".saving-step-00000004-1f2e3d4c", "state.json")
    make(run / "checkpoints" / ".deleting-step-00000004", "state.json")
    with pytest.raises(
        CheckpointError, match=rf"checkpoints/{name}: is not complete: .* name the run \({run}\), whose newest complete"
    ):
        find_model(run / "checkpoints" / name)
    # One that never was is answered as any other folder.
    with pytest.raises(CheckpointError, match="step-00000005 does not exist"):
        find_model(run / "checkpoints" / "step-00000005")


def test_a_wrong_name_is_answered_with_the_three_nearest_runs_beside_it(tmp_path):
    for name in ("dense", "sparse-a", "sparse-b", "sparse-c"):
        make(tmp_path / name, "config.yaml")
    make(tmp_path / "sparse-x")  # no run
    with pytest.raises(CheckpointError) as error:
        find_run(tmp_path / "sparse-d")
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'sparse-d'} does not exist; name a folder made by qsparse-moe train, such as ")
    named = said.partition(", such as ")[2].split(", ")
    assert sorted(named) == [str(tmp_path / f"sparse-{letter}") for letter in "abc"]


def test_a_folder_of_runs_is_answered_with_the_runs_in_it_and_a_file_is_named_as_one(tmp_path):
    make(tmp_path / "runs" / "only", "config.yaml")
    with pytest.raises(CheckpointError, match=f"runs is not a run folder.*such as {tmp_path / 'runs' / 'only'}$"):
        find_run(tmp_path / "runs")
    (tmp_path / "runs" / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="notes.txt is a file, not a run folder; .*such as .*only$"):
        find_run(tmp_path / "runs" / "notes.txt")
    with pytest.raises(CheckpointError, match="train$"):
        find_run(tmp_path / "empty" / "x")
