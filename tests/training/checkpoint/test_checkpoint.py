"""Checkpoints on one rank of the plain engine; other layouts are tested in tests/distributed."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.model.transformer import build_model
from qsparse_moe.training.checkpoint.save import save_checkpoint
from qsparse_moe.training.checkpoint.state import (
    check_shapes,
    owners,
    random_states,
    restore,
    seed_random_states,
    set_random_states,
)
from qsparse_moe.training.checkpoint.store import (
    FORMAT,
    Checkpoint,
    RunProgress,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_leftovers,
)
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import STATE_KINDS
from qsparse_moe.training.engines.torch_engine import TorchEngine
from tests.support.runs import tiny_config

ALONE = Distributed(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def engine(tmp_path):
    return make_engine(tmp_path, seed=0)


def make_engine(tmp_path, seed, **training):
    config = tiny_config(tmp_path, "run", **({"engine": "torch"} | training))
    engine = TorchEngine(config, build_model(config.model, seed=seed), ALONE)
    generator = torch.Generator().manual_seed(seed)
    for name in engine.shapes():
        for moment in ("exp_avg", "exp_avg_sq"):
            engine.get_full(name, moment).uniform_(generator=generator)
    engine.adam_step = 10 * seed + 3
    return engine


def save(run_dir, engine, step, keep_last=2):
    progress = RunProgress(step, step * 100, step * 0.5)
    return save_checkpoint(run_dir, engine, progress, {"step": step}, keep_last=keep_last)


def names(run_dir):
    return [path.name for path in list_checkpoints(run_dir)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_state_is_read_back_exactly(tmp_path, precision):
    engine, other = (make_engine(tmp_path, seed, precision=precision) for seed in (0, 1))
    engine.get_full("head.weight", "weight").add_(1e-5)
    path = save(tmp_path, engine, 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint.progress == RunProgress(7, 700, 3.5) and checkpoint.data_state == {"step": 7}
    restore(other, checkpoint.tensor, checkpoint.adam_step)
    assert other.adam_step == 3
    for name in engine.shapes():
        for kind in STATE_KINDS:
            assert other.get_full(name, kind).equal(engine.get_full(name, kind)), (name, kind)


def make_biased(tmp_path, rate=0.1):
    config = tiny_config(tmp_path, "run", engine="torch")
    moe = config.model.moe.model_copy(update={"bias_update_rate": rate})
    config = config.model_copy(update={"model": config.model.model_copy(update={"moe": moe})})
    return TorchEngine(config, build_model(config.model), ALONE)


def test_buffers_are_read_back_into_a_model_and_missing_ones_are_named(tmp_path, engine):
    biased = make_biased(tmp_path)
    for layer, block in enumerate(biased.model.blocks()):
        block.moe.router.expert_bias.copy_(torch.tensor([0.1, -0.2, 0.3, 1e-9]) + layer)
    checkpoint = Checkpoint(save(tmp_path / "biased", biased, 1))
    names = [f"layers.{layer}.moe.router.expert_bias" for layer in (0, 1)]
    assert checkpoint.buffer_shapes == dict.fromkeys(names, [4])
    assert not checkpoint.shapes.keys() & checkpoint.buffer_shapes.keys()
    other = make_biased(tmp_path)
    load_checkpoint(other.model, checkpoint)
    assert other.model.router_bias_LE.equal(biased.model.router_bias_LE)
    with pytest.raises(
        CheckpointError, match=r"expert_bias .*\(4,\) in the checkpoint and none \(no such tensor\) in the model"
    ):
        load_checkpoint(engine.model, checkpoint)
    plain = Checkpoint(save(tmp_path, engine, 1))
    assert plain.buffer_shapes == {}
    with pytest.raises(
        CheckpointError, match=r"expert_bias .*none \(no such tensor\) in the checkpoint and \(4,\) in the model"
    ):
        load_checkpoint(biased.model, plain)


def test_a_checkpoint_from_before_there_were_buffers_is_read(tmp_path, engine):
    path = save(tmp_path, engine, 1)
    index = json.loads((path / "state.json").read_text())
    del index["buffers"]
    (path / "state.json").write_text(json.dumps(index))
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint.buffer_shapes == {}
    load_checkpoint(engine.model, checkpoint)


def test_only_the_newest_are_kept_and_one_that_exists_is_left_alone(tmp_path, engine):
    for step in (1, 2, 3, 20):
        save(tmp_path, engine, step, keep_last=3)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000020"]
    before = (tmp_path / "checkpoints/step-00000020/state.json").stat().st_mtime_ns
    save(tmp_path, engine, 20, keep_last=1)
    assert (tmp_path / "checkpoints/step-00000020/state.json").stat().st_mtime_ns == before
    assert newest_checkpoint(tmp_path).progress.step == 20
    assert newest_checkpoint(tmp_path / "nothing") is None


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
        (torch, "save"),
        (shutil, "rmtree"),
        (json, "dump"),
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


def the_file(tmp_path):
    return tmp_path / "checkpoints/step-00000001/rank-00000-of-00001.pt"


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


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


def test_checkpoints_are_in_the_order_of_their_steps_and_a_message_names_the_one_just_before(tmp_path):
    folders = [tmp_path / "checkpoints" / f"step-{step}" for step in ("00000002", "99999999", "100000000", "200000000")]
    for folder in reversed(folders):
        folder.mkdir(parents=True)
    (tmp_path / "checkpoints" / ".saving-step-300000000").mkdir()
    assert list_checkpoints(tmp_path) == folders
    with pytest.raises(CheckpointError, match=rf"{folders[2]} .* {folders[1]}$"):
        Checkpoint(folders[2])


def test_the_message_about_the_only_checkpoint_names_no_earlier_one(tmp_path, engine):
    save(tmp_path, engine, 1)
    save(tmp_path, engine, 2)
    flip_a_byte(the_file(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(the_file(tmp_path).parent).verify()
    message = str(caught.value)
    assert "There is no earlier checkpoint" in message and str(the_file(tmp_path).parent) in message
    assert message.endswith("training.resume=true starts again at step 0")


def test_a_file_that_is_no_checkpoint_is_named(tmp_path, engine):
    save(tmp_path, engine, 1)
    file = the_file(tmp_path)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"rank-00000-of-00001\.pt cannot be read"):
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


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_files_are_mapped_and_not_read(tmp_path, engine):
    tensor = Checkpoint(save(tmp_path, engine, 1)).tensor("weight", "head.weight")
    assert str(the_file(tmp_path)) in pathlib.Path("/proc/self/maps").read_text()
    assert tensor.shape == (257, 40)


def test_every_parameter_has_one_owner_and_the_bytes_are_balanced_over_ranks():
    sizes = [7, 1000, 30, 400, 400, 8, 200, 1, 600]
    shapes = {f"p{index}": torch.Size((size, 2)) for index, size in enumerate(sizes)}
    owner = owners(shapes, 3)
    assert owner.keys() == shapes.keys()
    loads = [sum(shapes[name].numel() for name in owner if owner[name] == rank) for rank in range(3)]
    assert max(loads) <= sum(loads) / 3 * 1.15
    assert owners(dict(reversed(shapes.items())), 3) == owner
    assert set(owners({"only": torch.Size((4,))}, 3).values()) == {0}
    # Of equal sizes, the name decides, whatever the order of the model.
    for names in ("ab", "ba"):
        assert owners({name: torch.Size((4,)) for name in names}, 2) == {"a": 0, "b": 1}


def test_random_states_are_restored_from_a_file(tmp_path):
    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.normal(),
            random.random(),
            random.gauss(0, 1),
        )

    seed_random_states(5, 0, 0)
    # Half of a pair of normals is left over in two of the generators.
    draw()
    torch.save(random_states(), tmp_path / "random.pt")
    want = draw()
    assert draw() != want
    set_random_states(torch.load(tmp_path / "random.pt", weights_only=True))
    assert draw() == want


def test_seeds_differ_by_rank_and_step_and_repeat():
    def first(*arguments):
        seed_random_states(*arguments)
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    draws = [first(*arguments) for arguments in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(len(set(column)) == 4 for column in zip(*draws, strict=True))
    assert first(0, 0, 1) == draws[3]


@pytest.mark.parametrize("damaged", [0, 1])
def test_every_file_is_verified_by_one_rank_when_a_run_resumes(tmp_path, engine, damaged):
    path = save(tmp_path, engine, 1)
    index = json.loads((path / "state.json").read_text())
    facts = index["files"].pop("rank-00000-of-00001.pt")
    for rank in (0, 1):
        shutil.copyfile(the_file(tmp_path), path / f"rank-0000{rank}-of-00002.pt")
        index["files"][f"rank-0000{rank}-of-00002.pt"] = facts
    (path / "state.json").write_text(json.dumps(index))
    flip_a_byte(path / f"rank-0000{damaged}-of-00002.pt")
    found = []
    for rank in (0, 1):
        ranks = SimpleNamespace(rank=rank, world_size=2, on_every_rank=lambda function: [function()])
        try:
            assert newest_checkpoint(tmp_path, ranks).progress.step == 1
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) == 1 and f"rank-0000{damaged}-of-00002.pt does not have the checksum" in found[0]
