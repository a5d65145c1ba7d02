"""Checkpoints of a run whose data fails, whose disk is full, or whose last checkpoint is old."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time

import pytest

from qsparse_moe.data.packing import is_validation, text_digest
from qsparse_moe.errors import CheckpointError, DataError
from qsparse_moe.runs.folder import load_run_config, run_folder
from qsparse_moe.training.checkpoint import save as checkpoint_module
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.loop import train


class Losses:
    def __init__(self, fails_at=0):
        self.losses, self.fails_at, self.ended = {}, fails_at, 0

    def __call__(self, report):
        if report.step == self.fails_at:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        self.losses[report.step] = report.losses["loss"]

    def end(self, result):
        self.ended += 1


def streamed(config, file, **data):
    sources = (config.data.sources[0].model_copy(update={"kind": "jsonl", "path": str(file)}),)
    update = {"mode": "streaming", "shuffle_window": 2, "validation_fraction": 0.8, "sources": sources} | data
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


@pytest.fixture
def broken_file(tmp_path):
    """Write text for a few steps, then a line that is not JSON, then more text."""
    lines = [json.dumps({"text": f"document {i} " * 12}) for i in range(90)]
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join([*lines[:40], "{oops", *lines[40:]]) + "\n")
    return file


def test_a_data_error_in_the_middle_of_a_stream_saves_the_finished_steps(make_config, broken_file):
    whole, parts = Losses(), Losses()
    train(streamed(make_config("whole", steps=20), broken_file, max_bad_records=9), [whole])
    with pytest.raises(
        DataError, match=r"docs\.jsonl, row 40 .*ended after step (\d+) of 20; training\.resume=true"
    ) as error:
        train(streamed(make_config(steps=20), broken_file), [parts])
    done = max(parts.losses)
    assert 1 <= done < 20 and f"step-{done:08d}" in str(error.value) and parts.ended == 1
    assert [p.name for p in list_checkpoints(run_folder(make_config()))] == [f"step-{done:08d}"]
    train(streamed(make_config(steps=20, resume=True), broken_file, max_bad_records=9), [parts])
    assert parts.losses == whole.losses


def test_the_log_of_a_stream_says_how_often_it_was_read_to_its_end(make_config, tmp_path, caplog):
    texts = [f"document {i} " * 12 for i in range(10)]
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with caplog.at_level(logging.INFO):
        train(streamed(make_config(steps=12), file, validation_fraction=0.5, shuffle=False))
    (line,) = (record.getMessage() for record in caplog.records if "to its end" in record.getMessage())
    lengths = [len(text) + 1 for text in texts if not is_validation(text_digest(text.encode()), 0.5)]
    # Twelve steps of eight rows of 24 tokens, and a last label.
    tokens = given = 0
    while tokens < 12 * 8 * 24 + 1:
        tokens += lengths[given % len(lengths)]
        given += 1
    assert (given - 1) // len(lengths) == 2
    assert line == "data.sources.0: rank 0 read it to its end 2 times"


def test_a_full_disk_for_the_metrics_saves_the_finished_steps(make_config):
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: cannot be written \(No space left.* ended after step 4 of 6"
    ):
        train(make_config(), [Losses(fails_at=3)])
    assert [path.name for path in list_checkpoints(run_folder(make_config()))] == ["step-00000004"]


def test_a_full_disk_in_the_last_report_is_reported_too(make_config):
    with pytest.raises(CheckpointError, match=r"cannot be written .* after step 6 of 6; .*step-00000006"):
        train(make_config(), [Losses(fails_at=6)])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_during_a_save_is_one_message_and_leaves_nothing(make_config, monkeypatch):
    write = checkpoint_module.write_tensors

    def full(path, *content):
        path.symlink_to("/dev/full")
        return write(path, *content)

    monkeypatch.setattr(checkpoint_module, "write_tensors", full)
    with pytest.raises(
        CheckpointError,
        match=r"step-00000002: cannot be written \(No space left on device\); .*set training\.output_dir",
    ):
        train(make_config(steps=2))
    assert not list((run_folder(make_config()) / "checkpoints").iterdir())


class Disk:
    """Lets ``work()`` decide what becomes of the tensors of every checkpoint, by the name of its folder."""

    def __init__(self, monkeypatch, work):
        write = checkpoint_module.write_tensors

        def call(path, *content):
            work(path.parent.name)
            return write(path, *content)

        monkeypatch.setattr(checkpoint_module, "write_tensors", call)


def test_a_disk_that_fills_behind_the_training_ends_it_with_a_checkpoint_if_there_is_space_again(
    make_config, monkeypatch
):
    def fail_once(name):
        if "step-00000002" in name:
            raise OSError(28, "No space left on device")

    Disk(monkeypatch, fail_once)
    config = make_config(steps=200, checkpoint_interval=2)
    with pytest.raises(
        CheckpointError,
        match=r"step-00000002: cannot be written \(No space left on device\);.* intact\. The run ended after step "
        r"(\d+) of 200; training\.resume=true continues from .*/step-0*\1$",
    ):
        train(config)
    monkeypatch.undo()
    (path,) = list_checkpoints(run_folder(config))
    done = int(path.name.removeprefix("step-"))
    assert 2 < done < 200 and not list(path.parent.glob(".*"))
    assert train(make_config(steps=done + 1, resume=True)).step == done + 1


def test_a_disk_that_fills_just_before_the_next_checkpoint_costs_none_of_its_steps(make_config, monkeypatch):
    reported = threading.Event()

    def fail_late(name):
        if "step-00000002" in name:
            assert reported.wait(60)
            raise OSError(28, "No space left on device")

    def report(step):
        # The failure comes after step 4 has asked for one, and before its checkpoint.
        if step.step == 4:
            reported.set()

    Disk(monkeypatch, fail_late)
    config = make_config(steps=200, checkpoint_interval=2)
    with pytest.raises(
        CheckpointError, match=r"step-00000002: cannot be written .* ended after step 5 of 200; .*step-00000005$"
    ):
        train(config, [report])
    assert [path.name for path in list_checkpoints(run_folder(config))] == ["step-00000004", "step-00000005"]


def test_reports_have_the_time_that_training_waited_for_a_checkpoint(make_config, monkeypatch):
    third = threading.Event()
    waits = {}

    def report(step):
        waits[step.step] = step.checkpoint_seconds
        if step.step == 3:
            third.set()

    # The disk is done with step 2 once step 3 is reported, which training does not wait for.
    Disk(monkeypatch, lambda name: third.wait(60))
    train(make_config("behind", steps=3, checkpoint_interval=2), [report])
    # After the step, so that the next one reports it.
    assert waits[1] is waits[2] is None and 0 < waits[3] < 60
    Disk(monkeypatch, lambda name: time.sleep(0.5))
    train(make_config("waiting", steps=3, checkpoint_interval=2, checkpoint_async=False), [report])
    assert waits[1] is waits[2] is None and waits[3] >= 0.5


def test_sigterm_with_a_checkpoint_in_progress_finishes_it_and_saves_another(make_config, monkeypatch, caplog):
    writing, signaled = threading.Event(), threading.Event()

    def slow(name):
        writing.set()
        assert signaled.wait(60)

    def stop(report):
        if report.step == 3:
            assert writing.wait(60) and not list_checkpoints(run_folder(config))
            # In this thread, so that the handler has run when the disk goes on.
            signal.raise_signal(signal.SIGTERM)
            signaled.set()

    Disk(monkeypatch, slow)
    config = make_config(steps=500, checkpoint_interval=2)
    with caplog.at_level(logging.INFO):
        result = train(config, [stop])
    assert result.stopped_by == signal.SIGTERM and result.step == 4
    assert [path.name for path in list_checkpoints(run_folder(config))] == ["step-00000002", "step-00000004"]
    newest = list_checkpoints(run_folder(config))[-1]
    messages = [record.getMessage() for record in caplog.records]
    first = next(
        index for index, text in enumerate(messages) if text.startswith(f"saved {newest.with_name('step-00000002')} (")
    )
    assert any("SIGTERM: stopping after this step" in text for text in messages[:first])
    ending = f"stopped after step 4 of 500 with a checkpoint; training.resume=true continues from {newest}"
    assert any(text.endswith(ending) for text in messages[first:])


def test_a_checkpoint_is_saved_when_the_last_one_is_old_and_changes_nothing(make_config):
    plain, often = Losses(), Losses()
    first = train(make_config("plain", steps=3, checkpoint_minutes=0), [plain])
    second = train(make_config("often", steps=3, checkpoint_minutes=1e-9, keep_last=9), [often])
    assert [path.name for path in list_checkpoints(first.run_dir)] == ["step-00000003"]
    assert [path.name for path in list_checkpoints(second.run_dir)] == [f"step-0000000{step}" for step in (1, 2, 3)]
    assert plain.losses == often.losses


def test_a_run_is_read_and_resumed_from_any_folder(make_config, text_folder, tmp_path, monkeypatch):
    config = make_config(steps=2)
    source = config.data.sources[0].model_copy(update={"path": "text/*.txt"})
    relative = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source,)})})
    monkeypatch.chdir(text_folder)
    result = train(relative)
    monkeypatch.chdir(tmp_path)
    assert load_run_config(result.run_dir).data.sources[0].path == str(text_folder / "text" / "*.txt")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (text_folder / "text").iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    source = source.model_copy(update={"path": str(moved / "*.txt")})
    again = make_config(steps=3, resume=True)
    again = again.model_copy(update={"data": again.data.model_copy(update={"sources": (source,)})})
    assert train(again).step == 3
