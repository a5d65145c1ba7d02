"""A dense feed-forward network by itself: its sites, and the dtype of its products."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.nn.feed_forward import FeedForward
from qsparse_moe.nn.runtime import resolve_site_runtime

CPU = torch.device("cpu")


def make(part="shared", activation="swiglu"):
    sparsity = SparsityConfig(backend="torch")
    config = ModelConfig(hidden_size=12, num_heads=2, moe=MoEConfig(activation=activation), sparsity=sparsity)
    made = FeedForward(config, part, 20, resolve_site_runtime(sparsity, CPU))
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape))
    return made


@pytest.mark.parametrize("part", ["shared", "dense"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_the_sites_are_those_of_the_part_with_the_widths_of_the_matrices_behind_them(part, activation):
    made = make(part, activation)
    found = [(site.site, site.num_features) for site in (made.input_site, made.hidden_site)]
    assert found == [(f"{part}_input", 12), (f"{part}_hidden", 20)]
    assert made.input_site.ranking.select_rows is select_rows_torch
    shapes = {name: tuple(weight.shape) for name, weight in made.named_parameters()}
    gate = {"w_gate": (12, 20)} if activation == "swiglu" else {}
    assert shapes == gate | {"w_up": (12, 20), "w_down": (20, 12)}


def test_bf16_weights_multiply_rounded_rows_and_leave_the_rows_in_fp32():
    made = make().bfloat16()
    x = torch.randn(2, 3, 12)
    gate, up = ((x.bfloat16() @ weight).float() for weight in (made.w_gate, made.w_up))
    hidden = torch.nn.functional.silu(gate) * up
    want = (hidden.bfloat16() @ made.w_down).float()
    found, *_ = made(x, with_stats=False)
    assert found.dtype == torch.float32 and torch.equal(found, want)
