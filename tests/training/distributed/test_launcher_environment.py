from __future__ import annotations

import pytest

from qsparse_moe.cli import app
from qsparse_moe.errors import ConfigError
from qsparse_moe.training.distributed.launcher_environment import launcher_ranks, master_port, num_local_ranks

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
        ("WORLD_SIZE", "1234567890", "must be a whole number of at least 1"),
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


def test_the_ranks_of_a_machine_are_those_of_deepspeed_or_else_of_torchrun(monkeypatch):
    assert num_local_ranks() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert num_local_ranks() == 3
    monkeypatch.setenv("LOCAL_SIZE", "")
    assert num_local_ranks() == 3
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert num_local_ranks() == 8


@pytest.mark.parametrize("port", ["1", "65535"])
def test_the_ends_of_every_range_are_accepted(monkeypatch, port):
    set_all(monkeypatch, **WHOLE | {"MASTER_PORT": port, "WORLD_SIZE": "999999999", "RANK": "999999998"})
    assert launcher_ranks() == (999999998, 999999999, 1) and master_port() == int(port)
    set_all(monkeypatch, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert launcher_ranks() == (0, 2, 0)
    monkeypatch.delenv("MASTER_PORT")
    assert master_port() == 29500


@pytest.mark.parametrize("value", ["0", "65536", " 1", "1_0", "+1", "\N{ARABIC-INDIC DIGIT ONE}", "1234567890"])
def test_only_ascii_digits_within_the_range_are_a_port(monkeypatch, value):
    monkeypatch.setenv("MASTER_PORT", value)
    with pytest.raises(ConfigError, match="environment variable MASTER_PORT .* must be a whole number from 1 to 65535"):
        master_port()


def test_a_rank_without_the_number_of_ranks_is_one_alone_and_every_missing_variable_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert launcher_ranks() == (0, 1, 0)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match='RANK \\("1"\\) must be a whole number from 0 to 0'):
        launcher_ranks()
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="^environment variables RANK, MASTER_ADDR, MASTER_PORT are not set but"):
        launcher_ranks()


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
