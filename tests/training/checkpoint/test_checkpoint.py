"""Checkpoints on one rank of the plain engine; other layouts are tested in tests/distributed."""

from __future__ import annotations

import json
import pathlib
import random

import numpy as np
import pytest
import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.training.checkpoint.rank_state import pack_state, unpack_state
from qsparse_moe.training.checkpoint.state import random_states, restore, seed_random_states, set_random_states
from qsparse_moe.training.checkpoint.store import (
    Checkpoint,
    RunProgress,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from qsparse_moe.training.engines.protocol import STATE_KINDS
from tests.training.checkpoint.small_checkpoints import flip_a_byte, make_biased, make_engine, names, save, the_file


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_state_is_read_back_exactly(tmp_path, precision):
    engine, other = (make_engine(tmp_path, seed, precision=precision) for seed in (0, 1))
    engine.held("head.weight", "weight").add_(1e-5)
    path = save(tmp_path, engine, 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint.progress == RunProgress(7, 700, 3.5) and checkpoint.data_state == {"step": 7}
    restore(other, checkpoint.read, checkpoint.adam_step)
    assert other.adam_step == 3
    for name in engine.shapes():
        for kind in STATE_KINDS:
            assert other.held(name, kind).equal(engine.held(name, kind)), (name, kind)


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


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_files_are_mapped_and_not_read(tmp_path, engine):
    tensor = Checkpoint(save(tmp_path, engine, 1)).tensor("weight", "head.weight")
    assert str(the_file(tmp_path)) in pathlib.Path("/proc/self/maps").read_text()
    assert tensor.shape == (257, 40)


def test_random_states_are_restored_from_text_and_tensors():
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
    text, tensors = pack_state(random_states())
    want = draw()
    assert draw() != want
    set_random_states(unpack_state(text, tensors.__getitem__))
    assert draw() == want


def test_seeds_differ_by_rank_and_step_and_repeat():
    def first(*arguments):
        seed_random_states(*arguments)
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    draws = [first(*arguments) for arguments in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(len(set(column)) == 4 for column in zip(*draws, strict=True))
    assert first(0, 0, 1) == draws[3]
