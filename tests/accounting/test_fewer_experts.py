"""Parameters, operations, bytes, and memory under plans with fewer experts per token, by hand and as measured."""

from __future__ import annotations

import pytest

from qsparse_moe.accounting.activations import activation_memory
from qsparse_moe.accounting.densities import Densities, measured_densities, planned_densities
from qsparse_moe.accounting.description import describe_run
from qsparse_moe.accounting.experts_per_token import most_experts, planned_experts
from qsparse_moe.accounting.flops import forward_flops, training_flops
from qsparse_moe.accounting.layout_traffic import sent_bytes
from qsparse_moe.accounting.parameters import count_by_part, count_parameters
from qsparse_moe.accounting.traffic import weight_traffic
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.accounting.test_activations import LENGTH, ROWS, bytes_saved

D, F, E, A, LAYERS = 64, 96, 8, 3, 3
EXPERT = 3 * D * F
"""Elements of one expert with a gate."""


def run(sparsity=None, **settings):
    model = {
        "hidden_size": D, "num_layers": LAYERS, "num_heads": 4, "vocab_size": 128,
        "moe": {
            "num_experts": E, "experts_per_token": A, "expert_hidden_size": F, "backend": "loop",
            "activation": "swiglu",
        },
        "sparsity": {"default": 0.5} | (sparsity or {}),
    }  # fmt: skip
    training = {"micro_batch_size": ROWS, "global_batch_size": ROWS} | settings
    return RunConfig.model_validate({"model": model, "training": training, "data": {"sequence_length": LENGTH}})


FEWER = {"routing_overrides": [{"layers": 0, "experts_per_token": 2}, {"layers": 2, "experts_per_token": 0}]}
MISSING = 1 + 3
"""Experts per token that this plan leaves out of 9."""


def test_parameters_and_operations_are_less_by_those_of_the_experts_left_out():
    whole, fewer = run().model, run(FEWER).model
    all_counted, counted = count_parameters(whole), count_parameters(fewer)
    assert all_counted.active - counted.active == MISSING * EXPERT
    assert all_counted.needed - counted.needed == MISSING * EXPERT / 2 and all_counted.stored == counted.stored
    assert count_by_part(fewer)["experts"].active == (9 - MISSING) * EXPERT
    for given in ({}, {"plan": SparsityPlan.from_config(whole).with_experts({0: 2, 2: 0})}):
        before, after = forward_flops(whole, 16), forward_flops(whole if given else fewer, 16, **given)
        assert before.routed - after.routed == 2 * MISSING * EXPERT
        # One comparison and one magnitude per hidden feature of every expert, and per feature of a layer's one input.
        assert before.selection - after.selection == 2 * (MISSING * F + D)
        assert training_flops(whole, 16).routed - training_flops(fewer, 16).routed == 6 * MISSING * EXPERT


def test_bytes_read_follow_the_chance_that_a_token_of_the_step_uses_an_expert():
    config = run(FEWER | {"default": 0.0}).model
    for batch in (1, 4):
        read = weight_traffic(config, batch, bytes_per_weight=1.0)["experts"].needed
        chances = [1 - (1 - experts / E) ** batch for experts in (2, 3, 0)]
        assert read == pytest.approx(sum(chances) * E * EXPERT)


@pytest.mark.parametrize("mode", ["none", "feed_forward"])
def test_activations_are_those_that_autograd_stores(mode):
    config = run(FEWER)
    assert activation_memory(config, mode).saved == pytest.approx(bytes_saved(config, mode), rel=0.02)
    assert activation_memory(config, mode).saved < 0.75 * activation_memory(run(), mode).saved or mode != "none"


def test_a_schedule_needs_the_memory_of_all_experts_at_its_beginning():
    schedule = {"schedule": {"shape": "linear", "ramp_steps": 4}}
    ramped = run(FEWER | schedule, steps=9)
    assert planned_experts(ramped.model) == {0: 2, 1: 3, 2: 0} and most_experts(ramped.model) == {0: 3, 1: 3, 2: 3}
    assert activation_memory(ramped) == activation_memory(run())


def test_ranks_exchange_the_tokens_of_the_experts_in_use():
    sent = {}
    for name, sparsity in (("all", {}), ("fewer", FEWER)):
        config = run(sparsity, expert_parallel_size=2, global_batch_size=2 * ROWS)
        (exchange,) = [one for one in sent_bytes(config, 2) if one.purpose == "routed tokens"]
        sent[name] = exchange.within + exchange.between
    assert sent["fewer"] == pytest.approx(sent["all"] * (9 - MISSING) / 9)


def test_top_p_is_planned_at_its_largest_number_and_counted_at_the_measured_mean():
    config = run({"experts_per_token": 2, "top_p": 0.5})
    planned = planned_densities(config.model)
    assert [planned.experts(config.model, layer) for layer in range(LAYERS)] == [2, 2, 2]
    row = {f"sparsity/{site}/zeros/layer_{layer}": 0.5 for layer, site in planned}
    row |= {f"router/experts_per_token/layer_{layer}": used for layer, used in enumerate((1.25, 2.0, 0.0))}
    row = {name: value for name, value in row.items() if not (name.endswith("layer_2") and "expert_" in name)}
    row |= {"step": 7, "router/experts_per_token/layer_2": 0.0}
    measured = measured_densities(config.model, row)
    assert measured.experts_per_token == {0: 1.25, 1: 2.0, 2: 0.0}
    described = describe_run(config, row)
    assert described["experts_per_token"][0] == {"layer": 0, "most": 2, "top_p": 0.5, "measured": 1.25}
    assert describe_run(run())["experts_per_token"] == []
    assert described["parameters_by_part"]["experts"]["active"] == 6 * EXPERT
    of_experts = described["measured"]["parameters_by_part"]["experts"]
    assert of_experts["active"] == 3.25 * EXPERT and of_experts["kept"] == 3.25 * EXPERT / 2


def test_a_row_of_an_earlier_version_has_the_experts_of_the_model():
    config = run().model
    row = {f"sparsity/{site}/zeros/layer_{layer}": 0.25 for layer, site in planned_densities(config)}
    measured = measured_densities(config, row)
    assert isinstance(measured, Densities) and measured.experts_per_token == {}
    assert count_parameters(config, densities=measured).active == count_parameters(config).active


def test_every_part_of_a_built_model_has_the_stored_parameters_whatever_the_plan_uses():
    config = run(FEWER).model
    assert sum(p.numel() for p in build_model(config).parameters()) == count_parameters(config).stored
