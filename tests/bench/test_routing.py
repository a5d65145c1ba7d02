"""Inputs with a prescribed routing, in every precision and through every contender's router."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.bench.routing import LOADS, choose_experts, routed_input, router_weight


def test_balanced_loads_are_even_and_skewed_ones_decrease_from_expert_to_expert():
    balanced, skewed = (choose_experts(load, 1024, 16, 2).flatten().bincount(minlength=16) for load in LOADS)
    assert balanced.tolist() == [128] * 16
    assert skewed.sum() == 2048
    assert skewed[0] > 3 * skewed.float().mean()
    assert skewed[0] > skewed[3] > skewed[15] > 0
    uneven = choose_experts("balanced", 5, 3, 2).flatten().bincount()
    assert sorted(uneven.tolist()) == [3, 3, 4]


@pytest.mark.parametrize("load", LOADS)
def test_every_token_has_different_experts_and_the_same_ones_every_time(load):
    chosen = choose_experts(load, 64, 8, 8)
    assert (chosen.sort(1).values == torch.arange(8)).all()
    assert torch.equal(chosen, choose_experts(load, 64, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "choices"), [(16, 2), (64, 8), (4, 4), (3, 1)])
def test_a_linear_router_reads_the_choice_in_order(dtype, num_experts, choices):
    chosen = choose_experts("skewed", 500, num_experts, choices)
    x = routed_input(chosen, num_experts, 80).to(dtype)
    logits = x @ router_weight(num_experts, 80).to(dtype).T
    assert torch.equal(logits.topk(choices).indices, chosen)
