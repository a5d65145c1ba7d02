"""Dispatch of routed tokens to other ranks and back: values, order, and every gradient, on three processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsparse_moe.moe.dispatcher import (
    ExpertTokens,
    _inverse,
    _sort_by_expert,
    dispatch_reference,
    start_dispatch,
)
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup, expert_group, global_shape
from tests.support import expert_ranks
from tests.support.expert_ranks import COUNTS, LAYERS, A, E, P, expert_of, make_layer, rows_of, same_next, through

REPOSITORY = Path(__file__).resolve().parents[2]
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Of the largest value of a tensor: the order of additions in a matrix product may differ."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what every rank computed."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, expert_ranks.__file__, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], cwd=REPOSITORY) for rank in range(P)]
    try:
        assert [process.wait(120) for process in processes] == [0] * P
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(P)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", COUNTS)
def test_dispatch_and_combine_deliver_every_routed_token_and_every_gradient(ranks, case):
    inputs = [rows_of(case, rank) for rank in range(P)]
    rows = [part[0].requires_grad_() for part in inputs]
    want = dispatch_reference(rows, COUNTS[case])
    experts = dispatch_reference([expert_of(case, rank) for rank in range(P)], COUNTS[case])
    flags = dispatch_reference([same_next(expert_of(case, rank)) for rank in range(P)], COUNTS[case])
    home = [part * (expert_of(case, rank) + 1)[:, None] for rank, part in enumerate(rows)]
    torch.autograd.backward((*want, *home), (*(part[1] for part in inputs), *(part[2] for part in inputs)))
    for rank in range(P):
        found = ranks[rank]["sent"][case]
        assert found["x_MD"].equal(want[rank]) and found["expert_M"].equal(experts[rank])
        assert found["tokens_per_expert_L"].tolist() == [
            sum(c[e] for c in COUNTS[case]) for e in (2 * rank, 2 * rank + 1)
        ]
        assert found["continues_M"].equal(flags[rank])
        assert found["returned"].equal(home[rank])
        torch.testing.assert_close(found["grad"], rows[rank].grad, rtol=0, atol=1e-15)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_sharded_over_ranks_equals_the_whole_layer_in_value_sums_and_every_gradient(ranks, name):
    backend, dtype = LAYERS[name]["backend"], LAYERS[name]["dtype"]
    layer = make_layer(backend, dtype)
    wants = [through(layer, rank, dtype) for rank in range(P)]
    total = {key: sum(want["grads"][key].double() for want in wants) for key in wants[0]["grads"]}
    founds = [rank["layers"][name] for rank in ranks]

    def near(mine, theirs):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=ROUNDING[dtype] * theirs.abs().max())

    for rank, (found, want) in enumerate(zip(founds, wants, strict=True)):
        near(found["y"], want["y"])
        near(found["grad"], want["grad"])
        for key, grad in found["grads"].items():
            # An expert has the gradient of all ranks' tokens, anything else that of its own rank's.
            is_expert = key.startswith("experts.")
            near(grad, total[key].chunk(P)[rank] if is_expert else want["grads"][key])
    for key in wants[0]["stats"]:
        mine, theirs = (torch.stack([one["stats"][key].double() for one in some]).sum(0) for some in (founds, wants))
        if key.endswith("used_ED"):
            mine, theirs = mine > 0, theirs > 0
        if dtype != torch.bfloat16 or key == "router/routed_E":
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert sum(found["stats"]["sparsity/expert_hidden/rows_E"].sum() for found in founds) == A * (2 * 5 + 1 + 3 * 4)


def test_the_definition_of_the_dispatch_by_hand():
    x = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0]])]
    counts = [[1, 0, 2, 0], [0, 1, 1, 0]]
    assert [part.flatten().tolist() for part in dispatch_reference(x, counts)] == [[1.0, 4.0], [2.0, 3.0, 5.0]]


@pytest.mark.parametrize(("rank", "first"), [(0, 0), (2, 4)])
def test_received_tokens_are_sorted_by_expert_and_within_one_by_the_rank_that_sent_them(rank, first):
    # From rank 0 one token of the first expert and two of the second, from rank 1 none and one, from rank 2 two and 0.
    receive_PL = torch.tensor([[1, 2], [0, 1], [2, 0]])
    experts, order = _sort_by_expert(receive_PL, 6, rank)
    assert experts.tolist() == [first, first, first, first + 1, first + 1, first + 1]
    assert order.tolist() == [0, 4, 5, 1, 2, 3]
    assert _inverse(order).tolist() == [0, 3, 4, 5, 1, 2]


def test_a_rank_with_all_experts_sends_nothing():
    routed = ExpertTokens(torch.rand(3, 2), torch.tensor([1, 2]), torch.tensor([0, 1, 1]), None)
    dispatch = start_dispatch(routed, ALONE)
    y = torch.rand(3, 2)
    assert dispatch.receive() is routed and dispatch.combine(y) is y


def test_the_cases_have_the_loads_that_their_names_say():
    assert {len(counts) for case in COUNTS.values() for counts in case} == {E}
    per_expert = {case: [sum(column) for column in zip(*counts, strict=True)] for case, counts in COUNTS.items()}
    assert per_expert["one expert has all"].count(0) == E - 1 and per_expert["one expert has none"].count(0) == 1
    assert sum(per_expert["one row in all"]) == 1 and sum(per_expert["no rows at all"]) == 0


def test_initial_weights_of_a_rank_are_its_shard_of_the_full_initialisation():
    whole = make_layer("loop", torch.float64)
    for rank in range(P):
        share = make_layer("loop", torch.float64, ExpertGroup(rank, P))
        for (name, mine), theirs in zip(share.named_parameters(), whole.parameters(), strict=True):
            assert expert_group(theirs) is ALONE
            assert global_shape(mine) == theirs.shape
            is_expert = name.startswith("experts.")
            assert mine.equal(theirs.chunk(P)[rank] if is_expert else theirs), name
