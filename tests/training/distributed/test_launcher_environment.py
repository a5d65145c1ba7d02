from __future__ import annotations

import pytest

from qsparse_moe.cli import app
from qsparse_moe.errors import ConfigError
from qsparse_moe.training.distributed.launcher_environment import launcher_ranks, num_local_ranks

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*WHOLE, "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_the_environment_of_a_launcher_gives_the_rank_of_a_process(monkeypatch):
    assert launcher_ranks() == (0, 1, 0)
    set_all(monkeypatch, **WHOLE)
    assert launcher_ranks() == (1, 2, 1)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert num_local_ranks() == 8


def test_one_rank_needs_no_address(monkeypatch):
    set_all(monkeypatch, RANK="0", WORLD_SIZE="1")
    assert launcher_ranks() == (0, 1, 0)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("WORLD_SIZE", "abc", "must be a whole number of at least 1"),
        ("WORLD_SIZE", "0", "must be a whole number of at least 1"),
        ("WORLD_SIZE", "9" * 40, "must be a whole number of at least 1"),
        ("RANK", "2", "must be a whole number from 0 to 1"),
        ("RANK", "-1", "must be a whole number from 0 to 1"),
        ("LOCAL_RANK", "1.0", "must be a whole number from 0 to 1"),
        ("MASTER_PORT", "70000", "must be a whole number from 1 to 65535"),
    ],
)
def test_an_invalid_rank_is_refused_with_the_name_of_the_variable(monkeypatch, name, value, rule):
    set_all(monkeypatch, **WHOLE | {name: value})
    with pytest.raises(ConfigError) as caught:
        launcher_ranks()
    assert str(caught.value) == (
        f'environment variable {name} ("{value}") {rule}; a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, '
        "MASTER_PORT together. Start ranks with the deepspeed launcher, or unset them all"
    )


@pytest.mark.parametrize("name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_local_ranks_that_are_no_number_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "many")
    with pytest.raises(ConfigError, match=rf'environment variable {name} \("many"\) must be a whole number of at'):
        num_local_ranks()


@pytest.mark.parametrize("values", [{"WORLD_SIZE": "abc"}, WHOLE | {"RANK": "first"}])
def test_the_command_line_prints_it_in_one_message(monkeypatch, capsys, values, tmp_path):
    set_all(monkeypatch, **values)
    config = tmp_path / "run.yaml"
    config.write_text("training: {engine: torch, device: cpu, global_batch_size: 16}\n")
    assert app.run(["train", str(config), f"training.output_dir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: environment variable ") and message.count("\n") == 1
    assert not (tmp_path / "run").exists()
