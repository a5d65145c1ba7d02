from __future__ import annotations

import json
import math
import os

import pytest

from qsparse_moe.errors import CheckpointError
from qsparse_moe.metrics.jsonl import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_steps(path, steps, *, start_step=0):
    file = MetricsFile(path, start_step=start_step)
    for step in steps:
        file.write(step, step * 100, step * 0.1, {"train/loss": 3 - step / 7})
    file.close()


def test_line_is_one_object_with_step_tokens_and_seconds_first(path):
    write_steps(path, [5])
    assert list(json.loads(path.read_text()).items()) == [
        ("step", 5),
        ("tokens", 500),
        ("seconds", 0.5),
        ("train/loss", 3 - 5 / 7),
    ]


def test_a_missing_file_has_no_steps(path):
    assert read_metrics(path) == []


def test_lines_can_be_read_while_the_run_writes(path):
    file = MetricsFile(path)
    file.write(1, 100, 0.1, {})
    assert [row["step"] for row in read_metrics(path)] == [1]
    file.close()


def test_resumed_run_drops_later_steps_and_leaves_the_others_unchanged(path):
    write_steps(path, [1, 2, 3, 4])
    before = path.read_bytes().split(b"\n")
    write_steps(path, [3, 5], start_step=2)
    assert path.read_bytes().split(b"\n")[:2] == before[:2]
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 5]
    assert not list(path.parent.glob("*.part"))


def test_run_from_the_start_drops_every_step(path):
    write_steps(path, [1, 2])
    write_steps(path, [1])
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_file_cut_at_any_byte_reads_and_resumes(path):
    write_steps(path, [1, 2])
    whole = path.read_bytes()
    first_end = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        # The line without its newline is complete as soon as its last brace is there.
        expected = int(length >= first_end - 1) + int(length >= len(whole) - 1)
        assert [row["step"] for row in read_metrics(path)] == [1, 2][:expected], length
        write_steps(path, [7], start_step=5)
        assert [row["step"] for row in read_metrics(path)] == [*[1, 2][:expected], 7], length


def test_a_line_cut_inside_a_character_is_left_out(path):
    write_steps(path, [1])
    with path.open("ab") as file:
        file.write('{"step": 2, "note": "é'.encode()[:-1])
    assert [row["step"] for row in read_metrics(path)] == [1]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"tokens": 3}', '{"step": "1"}', ""])
def test_broken_line_before_the_last_names_file_line_rule_and_way_out(path, line):
    write_steps(path, [1, 2])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[1], ""]))
    whole = path.read_bytes()
    for attempt in (read_metrics, lambda path: MetricsFile(path, start_step=1)):
        with pytest.raises(CheckpointError, match="whole-number step; delete that line") as error:
            attempt(path)
        assert f"{path}, line 2, is {line!r}" in str(error.value)
    assert path.read_bytes() == whole


def test_a_long_broken_line_is_shown_by_its_first_60_characters(path):
    path.write_text("x" * 59 + "é" + "y" * 90 + '\n{"step": 2}\n')
    with pytest.raises(CheckpointError) as error:
        read_metrics(path)
    shown = "x" * 59 + "\N{REPLACEMENT CHARACTER}"  # the cut may lie inside a character
    assert str(error.value).startswith(f"{path}, line 1, is {shown!r}; every line")


def test_values_of_experts_have_a_key_of_their_own(path):
    file = MetricsFile(path)
    file.write(3, 30, 0.5, {"train/loss": 2.0}, {"layers": [1], "load": [[0.5, 1.5]]})
    file.write(4, 40, 0.6, {"train/loss": 1.5}, {})
    file.close()
    first, second = read_metrics(path)
    assert first["experts"] == {"layers": [1], "load": [[0.5, 1.5]]} and "load" not in first
    assert second == {"step": 4, "tokens": 40, "seconds": 0.6, "train/loss": 1.5}


def test_values_that_json_does_not_have_are_null(path):
    file = MetricsFile(path)
    file.write(1, 1, 0.1, {"train/grad_norm": math.inf, "train/loss": math.nan, "train/sparsity": 0.0})
    file.close()
    (row,) = read_metrics(path)
    assert (row["train/grad_norm"], row["train/loss"], row["train/sparsity"]) == (None, None, 0.0)


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(path, monkeypatch):
    write_steps(path, [1, 2])
    before, seen = path.read_text(), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_text()) or fsync(descriptor))
    write_steps(path, [], start_step=1)
    assert seen == [before] and [row["step"] for row in read_metrics(path)] == [1]


def test_a_step_is_amended_once_and_another_one_appended(path):
    file = MetricsFile(path)
    file.write(1, 100, 0.1, {"a": 1.0, "b": 2.0})
    file.amend(1, 100, 0.1, {"b": 3.0, "c": math.inf})
    file.amend(2, 200, 0.2, {"a": 4.0})
    file.write(3, 300, 0.3, {})
    file.close()
    assert read_metrics(path) == [
        {"step": 1, "tokens": 100, "seconds": 0.1, "a": 1.0, "b": 3.0, "c": None},
        {"step": 2, "tokens": 200, "seconds": 0.2, "a": 4.0},
        {"step": 3, "tokens": 300, "seconds": 0.3},
    ]
