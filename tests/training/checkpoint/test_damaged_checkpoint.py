"""Checkpoints that are interrupted, damaged, or of another model: what is refused, and what can be resumed."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.training.checkpoint.contents import FORMAT
from qsparse_moe.training.checkpoint.state import check_shapes
from qsparse_moe.training.checkpoint.store import Checkpoint, newest_checkpoint, remove_leftovers
from tests.training.checkpoint.small_checkpoints import flip_a_byte, names, save, the_file


class PowerCut(BaseException):
    """A crash that no ``except Exception`` catches, as when the machine loses power."""


def crash_after(calls):
    """Let the first ``calls`` calls that write to the disk succeed, and crash in the next one."""
    done = 0

    def guarded(function):
        def call(*args, **kwargs):
            nonlocal done
            if done == calls:
                raise PowerCut
            done += 1
            return function(*args, **kwargs)

        return call

    targets = [
        (os, "fsync"),
        (shutil, "rmtree"),
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "rename"),
    ]
    return [mock.patch.object(owner, name, guarded(getattr(owner, name))) for owner, name in targets]


def test_an_interrupted_save_leaves_a_checkpoint_to_resume_from(tmp_path, engine):
    outcomes = []
    for calls in range(100):
        run_dir = tmp_path / f"cut{calls}"
        save(run_dir, engine, 1, keep_last=1)
        patches = crash_after(calls)
        for patch in patches:
            patch.start()
        try:
            save(run_dir, engine, 2, keep_last=1)
            crashed = False
        except PowerCut:
            crashed = True
        finally:
            for patch in patches:
                patch.stop()
        outcomes.append(newest_checkpoint(run_dir).progress.step)
        remove_leftovers(run_dir)
        save(run_dir, engine, 3, keep_last=1)
        assert names(run_dir) == ["step-00000003"]
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000003"]
        if not crashed:
            break
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)
    assert len(outcomes) > 8, "every call that writes to the disk must have crashed once"


def test_a_folder_that_cannot_be_written_is_named_and_the_old_checkpoint_stays(tmp_path, engine):
    save(tmp_path, engine, 1)
    with (
        mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")),
        pytest.raises(
            CheckpointError,
            match=r"step-00000002: cannot be written \(No space left on device\).*set training\.output_dir",
        ),
    ):
        save(tmp_path, engine, 2)
    assert newest_checkpoint(tmp_path).progress.step == 1


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda file: file.unlink(), r"is missing \(expected: \d+ bytes\)"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), r"has \d+ bytes \(expected: \d+ bytes\)"),
        (flip_a_byte, "does not have the checksum that it was written with"),
    ],
)
def test_a_damaged_file_is_named_and_no_older_checkpoint_is_used_silently(tmp_path, engine, damage, what):
    save(tmp_path, engine, 0)
    save(tmp_path, engine, 1)
    damage(the_file(tmp_path))
    with pytest.raises(CheckpointError, match=what) as caught:
        newest_checkpoint(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(the_file(tmp_path)))
    folder = the_file(tmp_path).parent
    earlier = folder.with_name("step-00000000")
    assert message.endswith(f"delete the folder {folder} to continue from {earlier}")


def test_a_file_that_is_no_checkpoint_is_named(tmp_path, engine):
    save(tmp_path, engine, 1)
    file = the_file(tmp_path)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"rank-00000-of-00001\.safetensors cannot be read"):
        Checkpoint(file.parent).tensor("weight", "head.weight")


def test_an_index_that_cannot_be_read_or_is_of_another_version_is_named(tmp_path, engine):
    index = save(tmp_path, engine, 1) / "state.json"
    good = index.read_text()
    index.write_text(good.replace(FORMAT, "qsparse_moe.checkpoint/99"))
    with pytest.raises(CheckpointError, match=r"state\.json: .*'qsparse_moe.checkpoint/99'.*manifest\.json"):
        newest_checkpoint(tmp_path)
    for text in (good[:50], "[]", "{}"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read \("):
            newest_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read \("):
        newest_checkpoint(tmp_path)


def test_a_model_of_another_shape_is_refused_with_the_parameter_and_both_shapes(tmp_path, engine):
    checkpoint = Checkpoint(save(tmp_path, engine, 1))
    shapes = dict(engine.shapes())
    check_shapes(shapes, checkpoint.shapes, "state.json")
    with pytest.raises(
        CheckpointError,
        match=r"state.json: head.weight .*\(257, 40\) in the checkpoint and \(1, 2\) in the model.*config.yaml",
    ):
        check_shapes(shapes | {"head.weight": torch.Size((1, 2))}, checkpoint.shapes, "state.json")
    with pytest.raises(
        CheckpointError, match=r"extra .*none \(no such tensor\) in the checkpoint and \(3,\) in the model"
    ):
        check_shapes(shapes | {"extra": torch.Size((3,))}, checkpoint.shapes, "state.json")
    del shapes["head.weight"]
    with pytest.raises(
        CheckpointError, match=r"head.weight .* in the checkpoint and none \(no such tensor\) in the model"
    ):
        check_shapes(shapes, checkpoint.shapes, "state.json")


@pytest.mark.parametrize("damaged", [0, 1])
def test_every_file_is_verified_by_one_rank_when_a_run_resumes(tmp_path, engine, damaged):
    path = save(tmp_path, engine, 1)
    index = json.loads((path / "state.json").read_text())
    facts = index["files"].pop("rank-00000-of-00001.safetensors")
    for rank in (0, 1):
        shutil.copyfile(the_file(tmp_path), path / f"rank-0000{rank}-of-00002.safetensors")
        index["files"][f"rank-0000{rank}-of-00002.safetensors"] = facts
    (path / "state.json").write_text(json.dumps(index))
    flip_a_byte(path / f"rank-0000{damaged}-of-00002.safetensors")
    found = []
    for rank in (0, 1):
        ranks = SimpleNamespace(rank=rank, world_size=2, on_every_rank=lambda function: [function()])
        try:
            assert newest_checkpoint(tmp_path, ranks).progress.step == 1
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) == 1 and f"rank-0000{damaged}-of-00002.safetensors does not have the checksum" in found[0]
