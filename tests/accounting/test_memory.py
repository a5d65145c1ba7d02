"""Memory of model state by ZeRO stage, of the key-value cache, and peaks of devices."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.accounting.memory import kv_cache_bytes, state_memory
from qsparse_moe.accounting.parameters import count_parameters
from qsparse_moe.accounting.peaks import peak_flops
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.inference.kv_cache import KeyValueCache, cache_bytes
from tests.accounting.test_parameters import LATENT, model_config


def run(**training):
    return RunConfig.model_validate({"model": model_config(), "training": training})


def test_bf16_takes_18_bytes_per_parameter_and_each_stage_shards_more():
    config = run(precision="bf16")
    count = count_parameters(config.model).stored
    by_stage = [state_memory(config, 4, stage) for stage in range(4)]
    assert [memory.total / count for memory in by_stage] == pytest.approx([18, 9, 6, 4.5])
    assert by_stage[1].optimizer == pytest.approx(3 * count)
    assert by_stage[2].gradients == pytest.approx(count)
    assert by_stage[3].weights == pytest.approx(0.5 * count)


def test_fp32_weights_are_their_own_masters_without_zero_and_the_plain_engine_shards_nothing():
    count = count_parameters(run().model).stored
    # As layout_accuracy.py measures them.
    assert [state_memory(run(), 4, stage).total / count for stage in range(4)] == pytest.approx([16, 11, 8, 5])
    assert state_memory(run(engine="torch"), 4).total == 16 * count
    # Also in the table of all stages: the plain engine has none.
    assert [state_memory(run(engine="torch"), 4, stage).total for stage in range(4)] == [16 * count] * 4


def test_expert_parallel_weights_are_sharded_over_the_expert_data_parallel_group():
    config = run(precision="bf16")
    sharded = config.model_copy(update={"training": config.training.model_copy(update={"expert_parallel_size": 2})})
    experts = 2 * 3 * 4 * 32 * 24
    whole, half = (state_memory(c, 4, 1) for c in (config, sharded))
    assert whole.weights - half.weights == pytest.approx(2 * experts / 2)
    # Two ranks hold the same experts: a quarter of the whole each, as without.
    assert whole.optimizer == pytest.approx(half.optimizer)


@pytest.mark.parametrize(
    ("world_size", "parallel", "stage", "weights", "gradients", "optimizer"),
    [
        # Shares of the experts and of all other parameters: (E, others).
        (4, 2, 0, (1 / 2, 1), (1 / 2, 1), (1 / 2, 1)),
        (4, 2, 1, (1 / 2, 1), (1 / 2, 1), (1 / 4, 1 / 4)),
        (4, 2, 2, (1 / 2, 1), (1 / 4, 1 / 4), (1 / 4, 1 / 4)),
        (4, 2, 3, (1 / 4, 1 / 4), (1 / 4, 1 / 4), (1 / 4, 1 / 4)),
        (2, 2, 3, (1 / 2, 1 / 2), (1 / 2, 1 / 2), (1 / 2, 1 / 2)),
        (8, 4, 2, (1 / 4, 1), (1 / 8, 1 / 8), (1 / 8, 1 / 8)),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_kind_of_state_is_divided_over_its_own_ranks(
    precision, world_size, parallel, stage, weights, gradients, optimizer
):
    config = run(precision=precision, loss_scale={}) if precision == "fp16" else run(precision=precision)
    training = config.training.model_copy(update={"expert_parallel_size": parallel})
    found = state_memory(config.model_copy(update={"training": training}), world_size, stage)
    experts = 2 * 3 * 4 * 32 * 24
    others = count_parameters(config.model).stored - experts

    def held(bytes_each, shares):
        return pytest.approx(bytes_each * (shares[0] * experts + shares[1] * others))

    assert (found.weights, found.gradients, found.optimizer) == (
        held(2, weights), held(4, gradients), held(12, optimizer),
    )  # fmt: skip
    assert found.total == found.weights + found.gradients + found.optimizer


def test_the_cache_stores_keys_and_values_of_the_kv_heads():
    assert kv_cache_bytes(model_config(num_kv_heads=2), tokens=10) == 2 * 2 * 2 * 8 * 10 * 2


def test_the_cache_of_latent_attention_stores_one_vector_and_one_rotated_key():
    config = model_config(latent_attention=LATENT)
    assert kv_cache_bytes(config, tokens=10) == 2 * (12 + 4) * 10 * 2
    whole = KeyValueCache.allocate(config, batch=3, capacity=10, dtype=torch.bfloat16)
    assert whole.num_bytes == cache_bytes(config, batch=3, capacity=10, dtype=torch.bfloat16) == 3 * 640


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "fp16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("AMD EPYC", "bf16", None),
    ],
)
def test_a_peak_is_known_or_absent(device, precision, peak):
    assert peak_flops(device, precision) == peak
