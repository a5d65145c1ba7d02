"""Memory of a rank by part, against counts by hand; ``tests/distributed/test_layout_accuracy.py`` compares runs."""

from __future__ import annotations

import pytest

from qsparse_moe.accounting.layout_memory import checkpoint_bytes, rank_memory
from qsparse_moe.accounting.parameters import count_parameters
from qsparse_moe.config.schema import RunConfig
from tests.accounting.test_parameters import model_config

BUCKET = 1000


def run(stage=1, **training):
    deepspeed = {"zero_stage": stage, "reduce_bucket_size": BUCKET} | training.pop("deepspeed", {})
    settings = {"micro_batch_size": 1, "global_batch_size": 8, "deepspeed": deepspeed} | training
    data = {"sequence_length": 16}
    return RunConfig.model_validate({"model": model_config(), "data": data, "training": settings})


COUNT = count_parameters(run().model).stored


@pytest.mark.parametrize(
    ("config", "ranks", "weights", "gradients", "optimizer"),
    [
        # Bytes per parameter of a rank, at the loss of the last micro-batch: 4 ranks share what is sharded.
        (run(engine="torch"), 4, 4, 4, 8),
        (run(engine="torch", precision="bf16"), 4, 2, 4, 12),
        (run(0), 4, 4, 4, 8),
        (run(1), 4, 4, 4, 3),
        (run(1, precision="bf16"), 4, 2, 6, 3),
        (run(2), 4, 4, 1, 3),
        (run(2, precision="bf16"), 4, 2, 1, 3),
        (run(3), 4, 1, 1, 3),
        (run(3, precision="bf16"), 4, 0.5, 1, 3),
        (run(2, precision="bf16", deepspeed={"offload_optimizer": "cpu"}), 4, 2, 0, 0),
    ],
)
def test_the_state_of_every_stage(config, ranks, weights, gradients, optimizer):
    # A long sequence, so that the loss needs most.
    found = rank_memory(
        config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": 512})}), ranks
    )
    assert found.moment == "loss"
    assert (found.weights, found.gradients, found.optimizer) == pytest.approx(
        (weights * COUNT, gradients * COUNT, optimizer * COUNT)
    )


def test_buckets_have_their_size_however_small_the_model_is():
    def buckets(stage, **more):
        large = {"reduce_bucket_size": 10**7} | more.pop("deepspeed", {})
        return rank_memory(run(stage, deepspeed=large, **more), 2).buckets

    assert buckets(2, precision="bf16", deepspeed={"overlap_communication": True}) >= 2 * 2 * 10**7
    assert buckets(2, precision="bf16") < 2 * 2 * 10**7
    assert buckets(3, precision="bf16") >= 4 * 10**7
    assert buckets(0) == 0


def test_what_is_offloaded_is_counted_in_the_host():
    cpu = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    whole, moved = (rank_memory(run(3, precision="bf16", deepspeed=d), 2) for d in ({}, cpu))
    # Masters, moments, two sums of gradients, and weights of half of the parameters.
    assert moved.host_state == pytest.approx((4 + 8 + 4 + 4 + 2) * COUNT / 2)
    assert whole.host_state == 0
    assert whole.step - moved.step >= (4 + 8 + 4 + 2) * COUNT / 2 * 0.99
    nvme = {"offload_optimizer": "nvme", "offload_parameters": "none", "nvme_path": "/scratch"}
    assert rank_memory(run(3, precision="bf16", deepspeed=nvme), 2).nvme == pytest.approx(12 * COUNT / 2)


def test_a_snapshot_is_the_share_of_a_checkpoint():
    assert checkpoint_bytes(run()) == 12 * COUNT
    assert rank_memory(run(2), 4).host_snapshot == pytest.approx(12 * COUNT / 4)
    assert rank_memory(run(2, checkpoint_async=False), 4).host_snapshot == 0


def test_expert_parallel_ranks_hold_fewer_experts_and_exchange_rows():
    alone, shared = (rank_memory(run(0, expert_parallel_size=size), 4) for size in (1, 4))
    experts = 2 * 3 * 4 * 32 * 24
    assert alone.weights - shared.weights == pytest.approx(4 * experts * 3 / 4)
    assert alone.exchange == 0
    assert shared.exchange == 3 * 16 * run().model.moe.experts_per_token * run().model.hidden_size * 4


def test_zero_3_gathers_the_whole_of_a_small_model():
    assert rank_memory(run(3), 4).gathered == 4 * COUNT
