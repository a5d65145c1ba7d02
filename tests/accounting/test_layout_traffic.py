"""Bytes that a rank sends, within and between nodes, and the weights that ZeRO-3 gathers."""

from __future__ import annotations

import pytest

from qsparse_moe.accounting import zero3_gathers as gathers
from qsparse_moe.accounting.layout_counts import model_modules
from qsparse_moe.accounting.layout_traffic import sent_bytes
from tests.accounting.test_layout_memory import COUNT, run

EXPERTS = 2 * 3 * 4 * 32 * 24


def totals(config, ranks, nodes=1):
    return {
        purpose: sum(one.total for one in sent_bytes(config, ranks, nodes) if one.purpose == purpose)
        for purpose in ("gradients", "updated weights", "gathered weights", "routed tokens")
    }


def test_one_rank_sends_nothing():
    assert sent_bytes(run(3), 1) == ()


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 2), (2, 2 * 4), (3, 4)])
def test_gradients_are_reduced_once_or_in_each_of_four_micro_batches(stage, passes):
    # 8 sequences on 2 ranks in micro-batches of 1.
    assert totals(run(stage), 2)["gradients"] == pytest.approx(passes * 4 * COUNT / 2)


def test_updated_weights_are_gathered_in_the_precision_of_the_run():
    assert totals(run(2, precision="bf16"), 4)["updated weights"] == pytest.approx(2 * COUNT * 3 / 4)
    assert totals(run(0), 4)["updated weights"] == 0


def test_a_ring_leaves_a_node_once_for_all_ranks_of_the_node():
    (gradients,) = sent_bytes(run(0), 8, nodes=2)
    assert gradients.total == pytest.approx(2 * 4 * COUNT * 7 / 8)
    assert gradients.between == pytest.approx(gradients.total / 4)
    (gradients,) = sent_bytes(run(0), 8, nodes=8)
    assert gradients.within == 0


def test_routed_tokens_go_to_their_experts_and_back_in_both_directions():
    config = run(0, expert_parallel_size=4)
    rows = 16 * config.model.moe.experts_per_token
    sent = 4 * rows * config.model.hidden_size * 4 * 2 * 2
    found = totals(config, 4)
    assert found["routed tokens"] == pytest.approx(sent * 3 / 4)
    # The experts of a rank are nobody else's.
    assert found["gradients"] == pytest.approx(2 * 4 * (COUNT - EXPERTS) * 3 / 4)
    again = run(0, expert_parallel_size=4, activation_checkpointing="full")
    assert totals(again, 4)["routed tokens"] == pytest.approx(1.5 * sent * 3 / 4)


def test_an_exchange_between_nodes_is_in_proportion_to_their_ranks():
    (sent,) = (one for one in sent_bytes(run(0, expert_parallel_size=4), 4, nodes=2) if one.purpose == "routed tokens")
    assert sent.between == pytest.approx(2 * sent.within)


def sizes(config):
    return [sum(module.sizes) for module in model_modules(config.model)]


def test_a_model_below_the_limit_is_gathered_once_per_micro_batch(monkeypatch):
    monkeypatch.setattr(gathers, "PERSISTENT", 0)
    gathers._simulate.cache_clear()
    found = gathers.zero3_gathers(run(3), 2)
    assert (found.dense + found.experts, found.most_live) == (COUNT, COUNT)
    assert found.experts == EXPERTS


def test_without_room_every_module_is_gathered_twice_and_alone(monkeypatch):
    monkeypatch.setattr(gathers, "PERSISTENT", 0)
    monkeypatch.setattr(gathers, "MAX_LIVE", 1)
    gathers._simulate.cache_clear()
    config = run(3, deepspeed={"reduce_bucket_size": 1})
    found = gathers.zero3_gathers(config, 2)
    gathers._simulate.cache_clear()
    # The last module runs backward directly after its forward pass and stays.
    assert found.dense + found.experts == 2 * COUNT - sizes(config)[-1]
    assert found.most_live == max(sizes(config))


def test_a_recomputed_layer_is_gathered_a_third_time_where_nothing_stays(monkeypatch):
    monkeypatch.setattr(gathers, "PERSISTENT", 0)
    monkeypatch.setattr(gathers, "MAX_LIVE", 1)
    gathers._simulate.cache_clear()
    config = run(3, activation_checkpointing="full", deepspeed={"reduce_bucket_size": 1})
    found = gathers.zero3_gathers(config, 2)
    gathers._simulate.cache_clear()
    in_layers = [sum(module.sizes) for module in model_modules(config.model) if module.layer >= 0]
    # In each of the two layers the last module is used twice in a row: recomputed, then differentiated.
    layers = [[sum(m.sizes) for m in model_modules(config.model) if m.layer == layer] for layer in (0, 1)]
    expected = 2 * COUNT - sizes(config)[-1] + sum(in_layers) - sum(layer[-1] for layer in layers)
    assert found.dense + found.experts == expected


def test_what_no_other_rank_has_a_part_of_is_not_copied():
    assert gathers.zero3_gathers(run(3), 1).most_live == 0
    shared = run(3, expert_parallel_size=2)
    alone, others = (gathers.zero3_gathers(shared, ranks).most_live for ranks in (2, 4))
    assert others - alone == EXPERTS / 2
