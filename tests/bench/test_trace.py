"""The trace of a step: operators, copies, waits and memory, for a step in which all of them are known."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.bench import trace
from qsparse_moe.bench.moe_layer import layer_config
from qsparse_moe.bench.moe_peers import LayerShape
from qsparse_moe.moe.backends import loop
from qsparse_moe.moe.permutation import TokenCounts

CPU = torch.device("cpu")


def test_operators_are_listed_with_their_own_time():
    a = torch.randn(300, 300)

    def step():
        for _ in range(5):
            a @ a
        a.exp()

    found = trace.operator_times(step, device=CPU, top=3)
    assert len(found) == 3
    assert found[0]["name"] == "aten::mm"
    assert found[0]["calls"] == 5
    shares = [operator["share"] for operator in found]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1 + 1e-3
    assert found[0]["seconds"] > 0


def test_the_peak_counts_memory_in_use_at_the_same_time_and_nothing_allocated_before():
    before = torch.zeros(1000)

    def step():
        first = before + 1  # 4000 bytes
        second = first * first  # and 4000 more
        del first
        third = second.double()  # 4000 + 8000
        del second, third
        before.repeat(2)  # 8000 alone

    assert trace.peak_bytes(step, device=CPU) == 12000


@pytest.mark.parametrize("waits", [False, True])
def test_copies_and_waits_name_their_source_line_in_forward_and_backward(waits):
    rows = torch.randn(6, 4, requires_grad=True)
    weights = torch.randn(2, 4, 8, requires_grad=True)

    def step():
        y = loop.matmul(rows, weights, TokenCounts(torch.tensor([2, 4])))
        if waits:
            y.sum().item()
        torch.autograd.grad(y, (rows, weights), torch.ones_like(y))

    found = trace.copies_and_waits(step, device=CPU)
    joined = next(copy for copy in found["copies"] if copy["operator"] == "cat")
    assert (joined["calls"], joined["bytes"]) == (1, 6 * 8 * 4)
    assert joined["place"].startswith("moe/backends/loop.py:")
    assert joined["place"].endswith(" matmul")
    assert [copy["bytes"] for copy in found["copies"]] == sorted((c["bytes"] for c in found["copies"]), reverse=True)
    listed = next(wait for wait in found["waits"] if wait["operator"] == "tolist")
    assert listed["calls"] == 1
    assert listed["place"].startswith("moe/permutation.py:")
    assert any(wait["operator"] == "_local_scalar_dense" for wait in found["waits"]) == waits


def test_operations_inside_a_custom_backward_function_are_traced_too():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad.tolist()
            return grad.clone()

    x = torch.randn(3, requires_grad=True)
    found = trace.copies_and_waits(lambda: torch.autograd.grad(Waits.apply(x).sum(), x), device=CPU)
    assert {"operator": "tolist", "place": "PyTorch", "calls": 1} in found["waits"]
    assert sum(copy["calls"] for copy in found["copies"] if copy["operator"] == "clone") == 2


def test_a_settings_object_has_the_requested_shape():
    moe = layer_config(LayerShape(64, 32, 48, 4, 2), "loop").moe
    assert (moe.num_experts, moe.experts_per_token, moe.expert_hidden_size, moe.backend) == (4, 2, 48, "loop")
