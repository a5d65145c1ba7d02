"""Weights that are read for one rank: its range of every large parameter, and the small ones as a whole."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.model.init import RandomWeights
from qsparse_moe.model.transformer import build_empty, build_model
from qsparse_moe.training import shard_weights as module
from qsparse_moe.training.distributed.ranks import ONE_RANK, Distributed
from qsparse_moe.training.shard_weights import choose_sharding, fill_model, shard_weights
from tests.ablation.small_models import config
from tests.support.runs import LAYOUTS, tiny_config


class Rank(Distributed):
    """The last of three ranks, which finds no error on the others."""

    def on_every_rank(self, work):
        return [None, None, work()]


LAST = Rank(2, 3, 2, torch.device("cpu"))


class Read(RandomWeights):
    """Random weights that say what is read of them."""

    def __init__(self, settings):
        super().__init__(settings, seed=5)
        self.ranges = {}

    def fill(self, name, start, out):
        self.ranges[name] = (start, start + len(out))
        super().fill(name, start, out)


def test_a_rank_reads_and_keeps_its_range_of_large_parameters_and_all_of_small_ones(monkeypatch):
    # 31 * 16 elements of the embedding: the ranges have 166, 166, and 164.
    monkeypatch.setattr(module, "SMALLEST", 200)
    settings = config(default=0.5)
    model, read = build_empty(settings), Read(settings)
    shard_weights(model, read, LAST, torch.bfloat16)
    whole = dict(build_model(settings, seed=5, dtype=torch.bfloat16).named_parameters())
    assert read.ranges.keys() == whole.keys() and read.ranges["embedding.weight"] == (332, 496)
    for name, want in whole.items():
        size = want.numel()
        assert read.ranges[name] == ((0, size) if size < 200 else (2 * -(-size // 3), size)), name
        found = model.get_parameter(name)
        assert found.shape == want.shape and found.dtype == torch.bfloat16
        assert torch.equal(found, want) if size < 200 else found.isnan().all()
    shard = model.embedding.sharded_parameters.parameters["weight"].shard
    assert torch.equal(shard[:164], whole["embedding.weight"].flatten()[332:]) and shard[164:].tolist() == [0, 0]


def test_without_ranks_a_model_has_all_of_its_weights():
    settings = config(default=0.5)
    model = build_empty(settings)
    fill_model(model, Read(settings), device="cpu", dtype=torch.float32, distributed=None)
    want = build_model(settings, seed=5)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in want.named_parameters())


def test_a_damaged_tensor_is_the_error_of_every_rank(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 0)

    class Damaged(Read):
        def fill(self, name, start, out):
            raise CheckpointError(f"{name} is damaged")

    class First(Rank):
        def on_every_rank(self, work):
            _, error = self.attempt(work)
            raise error

    with pytest.raises(CheckpointError, match="embedding.weight is damaged"):
        shard_weights(build_empty(config()), Damaged(config()), First(0, 3, 0, torch.device("cpu")), torch.float32)


@pytest.mark.parametrize(
    ("layout", "size", "by_default"),
    [("torch", 1, False), ("zero2", 1, False), ("zero3", 1, True), ("zero2", 2, True), ("torch", 2, True)],
)
def test_weights_are_divided_as_in_training_unless_asked_otherwise_and_never_on_one_rank(
    tmp_path, layout, size, by_default
):
    run = tiny_config(tmp_path, "run", expert_parallel_size=size, **LAYOUTS[layout])
    assert choose_sharding(None, run, LAST) is (LAST if by_default else None)
    assert choose_sharding(True, run, LAST) is LAST and choose_sharding(False, run, LAST) is None
    assert choose_sharding(None, run, ONE_RANK) is None and choose_sharding(None, run, None) is None
