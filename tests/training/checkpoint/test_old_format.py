"""A checkpoint of format 1, which two ranks of an earlier version wrote: every value follows from its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qsparse_moe.model.transformer import build_model
from qsparse_moe.training.checkpoint.state import random_states, restore, seed_random_states, set_random_states
from qsparse_moe.training.checkpoint.store import RunProgress, load_checkpoint, newest_checkpoint
from qsparse_moe.training.engines.protocol import STATE_KINDS
from qsparse_moe.training.engines.torch_engine import TorchEngine
from tests.support.runs import tiny_config
from tests.training.checkpoint.small_checkpoints import ALONE

RUN = Path(__file__).with_name("format_1")
MODEL = {
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "head_size": 4,
    "vocab_size": 16,
    "moe": {"num_experts": 2, "expert_hidden_size": 8, "bias_update_rate": 0.1},
}


@pytest.fixture(scope="module")
def checkpoint():
    return newest_checkpoint(RUN)


def value(place, kind, size):
    return torch.arange(size) / 8 + 100 * place + 1000 * STATE_KINDS.index(kind)


def test_the_index_and_the_states_of_both_ranks_are_read(checkpoint):
    assert checkpoint.progress == RunProgress(3, 300, 1.5) and checkpoint.adam_step == 3
    assert checkpoint.world_size == 2 and checkpoint.data_state == {"step": 3}
    for rank in (0, 1):
        state = checkpoint.report_state(rank)
        assert state.listeners == {"recorder": {"window": [1.5]}} and state.evaluation_pending
        assert state.monitor["choices"]["sequences"] == 77 + rank
        assert state.monitor["choices"]["choices"][0].tolist() == [[rank], [1 - rank]]
        assert state.monitor["dead_experts"]["idle_LE"].tolist() == [[4, 0]]
        before = random_states()
        seed_random_states(5, 3, rank)
        want = torch.rand(2)
        set_random_states(checkpoint.random_states(rank))
        assert torch.rand(2).equal(want)
        set_random_states(before)


def test_weights_moments_and_buffers_are_restored_by_ranges(checkpoint, tmp_path):
    config = tiny_config(tmp_path, "run", engine="torch", model=MODEL)
    model = build_model(config.model)
    load_checkpoint(model, checkpoint)
    assert model.layers[0].moe.router.expert_bias.tolist() == [0.25, -0.25]
    engine = TorchEngine(config, model, ALONE)
    restore(engine, checkpoint.read, checkpoint.adam_step)
    assert engine.adam_step == 3
    for place, (name, shape) in enumerate(engine.shapes().items()):
        for kind in STATE_KINDS:
            want = value(place, kind, shape.numel())
            assert engine.held(name, kind).equal(want), (name, kind)
            assert checkpoint.read(kind, name, 1, 3).equal(want[1:3])
            assert checkpoint.tensor(kind, name).shape == shape
