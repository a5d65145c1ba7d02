"""The model of a step's time: each part by hand where it is the one that limits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qsparse_moe.accounting.activations import activation_memory
from qsparse_moe.accounting.devices import KNOWN
from qsparse_moe.accounting.flops import forward_flops, training_flops
from qsparse_moe.accounting.layout_traffic import sent_bytes
from qsparse_moe.accounting.step_time import MEMORY, NETWORK, PRODUCTS, step_time
from tests.accounting.test_layout_memory import COUNT, run

# So fast that nothing but what a test slows down takes time.
FAST = replace(
    KNOWN["h100-80gb"], bf16=1e30, fp32=1e30, bandwidth=1e30, link=1e30, network=1e30, host_link=1e30
)  # fmt: skip
TOKENS = 8 * 16


def timed(config, ranks=1, nodes=1, **rates):
    return step_time(config, ranks, replace(FAST, **rates), sent_bytes(config, ranks, nodes))


@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("full", 1), ("selective", 0)])
def test_products_take_the_operations_with_those_that_are_recomputed(recompute, again):
    config = run(0, activation_checkpointing=recompute)
    operations = training_flops(config.model, 16).routed + again * forward_flops(config.model, 16).routed
    time = timed(config, fp32=1e9)
    assert time.products == pytest.approx(TOKENS * operations / (PRODUCTS * 1e9))
    assert time.limit == "compute"
    assert time.utilisation == pytest.approx(TOKENS * training_flops(config.model, 16).routed / 1e9 / time.total)


def test_weights_and_activations_pass_over_memory():
    config = run(0)
    time = timed(config, bandwidth=1e6)
    # Three products read every weight in each of 8 micro-batches.
    assert time.products == pytest.approx(8 * 3 * 4 * COUNT / (MEMORY * 1e6))
    assert time.passes == pytest.approx(8 * 3 * activation_memory(config).saved / (MEMORY * 1e6))
    assert time.update == pytest.approx(28 * COUNT / (MEMORY * 1e6))


def test_gradients_that_do_not_overlap_are_waited_for():
    config = run(1)
    time = timed(config, 2, link=1e6)
    # The all-reduce of the gradients, and the all-gather of the weights.
    assert time.collectives == pytest.approx((2 * 4 * COUNT / 2 + 4 * COUNT / 2) / (NETWORK * 1e6))
    assert time.limit == "network"
    overlapping = run(1, deepspeed={"overlap_communication": True})
    slow = timed(overlapping, 2, link=1e6, fp32=1e6)
    assert slow.collectives == pytest.approx(4 * COUNT / 2 / (NETWORK * 1e6))


def test_links_within_and_between_nodes_work_at_the_same_time():
    config = run(0)
    (sent,) = sent_bytes(config, 8, 2)
    assert timed(config, 8, 2, network=1e6).collectives == pytest.approx(sent.between / (NETWORK * 1e6))
    assert timed(config, 8, 2, network=1e6, link=1e6).collectives == pytest.approx(sent.within / (NETWORK * 1e6))


def test_an_exchange_of_tokens_is_waited_for():
    config = run(0, expert_parallel_size=2)
    (routed,) = (one for one in sent_bytes(config, 2) if one.purpose == "routed tokens")
    assert timed(config, 2, link=1e6).exchange == pytest.approx(routed.total / (NETWORK * 1e6))


def test_offload_passes_the_host_link():
    config = run(2, precision="bf16", deepspeed={"offload_optimizer": "cpu"})
    time = timed(config, 2, host_link=1e6)
    assert time.host == pytest.approx((4 + 2) * COUNT / 2 / 1e6, rel=1e-3)
    assert time.update == 0
