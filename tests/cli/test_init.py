"""``qsparse-moe init``: what it writes can be used at once, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsparse_moe.ablation.grid.file import grid_points, read_grid_file
from qsparse_moe.cli.app import run
from qsparse_moe.config.load import load_config
from qsparse_moe.config.shipped import SCHEMA, shipped_files

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_name_it_writes_the_configuration_of_the_quickstart(folder, capsys):
    assert run(["init"]) == 0
    assert "next: qsparse-moe train tiny.yaml" in capsys.readouterr().out
    assert load_config(folder / "tiny.yaml") == load_config(REPOSITORY / "configs" / "tiny.yaml")
    assert (folder / "tiny.yaml").read_text().splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA}"


@pytest.mark.parametrize("name", [file.name for file in shipped_files().values() if file.kind == "config"])
def test_every_configuration_that_is_listed_can_be_written_and_loaded(folder, name):
    assert run(["init", name, "--output", "mine.yaml"]) == 0
    load_config(folder / "mine.yaml")


@pytest.mark.parametrize("name", [file.name for file in shipped_files().values() if file.kind == "grid"])
def test_a_grid_is_written_with_the_configuration_that_it_is_based_on(folder, name, capsys):
    assert run(["init", name, "--output", "sub/grid.yaml", "--json"]) == 0
    files = [Path(file) for file in json.loads(capsys.readouterr().out)["files"]]
    assert len(files) == 2 and all(file.parent == Path("sub") for file in files)
    grid = folder / "sub" / "grid.yaml"
    assert grid_points(grid, read_grid_file(grid))


def test_list_names_every_file_in_one_sentence(capsys):
    assert run(["init", "--list", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    names = {file["name"] for file in files}
    configs = REPOSITORY / "configs"
    on_disk = {path.relative_to(configs).with_suffix("").as_posix() for path in configs.rglob("*.yaml")}
    assert on_disk <= names and {"examples/training_loop", "examples/own_data"} <= names
    assert all(file["summary"].endswith(".") and len(file["summary"]) > 20 for file in files)
    assert run(["init", "--list"]) == 0
    assert "recipes/mixtral-8x7b" in capsys.readouterr().out


def test_existing_files_are_not_overwritten_unless_force_is_given(folder, capsys):
    (folder / "paper-miniature.yaml").write_text("mine")
    assert run(["init", "ablations/sparsity"]) == 2
    message = capsys.readouterr().err
    assert "paper-miniature.yaml exists" in message and "--force" in message
    assert not (folder / "sparsity.yaml").exists(), "nothing is written before every file has been checked"
    assert run(["init", "ablations/sparsity", "--force"]) == 0
    assert (folder / "paper-miniature.yaml").read_text() != "mine"


def test_an_unknown_name_is_refused_with_the_nearest(capsys):
    assert run(["init", "recipes/mixtral"]) == 2
    assert "recipes/mixtral-8x7b" in capsys.readouterr().err


def test_a_folder_is_refused_as_the_output(folder, capsys):
    assert run(["init", "--output", str(folder)]) == 2
    assert "is a folder" in capsys.readouterr().err
