"""Shared experts, with and without their gate, against a loop over tokens and against transformers' own block."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.config.shapes import shared_hidden_size
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.activations import REFERENCES
from qsparse_moe.sparsity.plan import num_selected
from qsparse_moe.sparsity.topk import topk_sparsify

B, S, D, F, E, A = 2, 5, 16, 24, 4, 2


def make(dtype=torch.float64, *, scale=20.0, sparsity=None, **moe):
    settings = {
        "num_experts": E, "experts_per_token": A, "expert_hidden_size": F, "activation": "swiglu",
        "num_shared_experts": 1, "shared_expert_gate": True,
    }  # fmt: skip
    sparse = SparsityConfig.model_validate({"sites": sparsity or {}})
    config = ModelConfig(hidden_size=D, num_heads=2, moe=MoEConfig(**settings | moe), sparsity=sparse)
    layer = MoELayer(config).to(torch.float64)
    initialize(layer, config, seed=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)  # away from zero, where many mistakes give the same result
    for site, module in {"shared_input": layer.shared.input_site, "shared_hidden": layer.shared.hidden_site}.items():
        module.set_sparsity([(sparsity or {}).get(site, 0.0)])
    return layer.to(dtype)


def shared_token_by_token(shared, x_TD, input_sparsity, hidden_sparsity):
    rows = []
    for row in x_TD:
        sparse = topk_sparsify(row, num_selected(input_sparsity, D))
        hidden = REFERENCES["swiglu"](sparse @ shared.w_gate, sparse @ shared.w_up)
        y = topk_sparsify(hidden, num_selected(hidden_sparsity, len(hidden))) @ shared.w_down
        # Of the dense row: the gate is a router.
        rows.append(y if shared.token_gate is None else y / (1 + torch.exp(-(row * shared.token_gate[0]).sum())))
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [None, 40])
@pytest.mark.parametrize("values", [(0.0, 0.0), (0.5, 0.6)], ids=["dense", "sparse"])
def test_shared_experts_are_added_token_by_token_in_value_and_every_gradient(gated, width, values):
    sparsity = dict(zip(("shared_input", "shared_hidden"), values, strict=True))
    shape = {"num_shared_experts": 2, "shared_expert_hidden_size": width}
    layer = make(sparsity=sparsity, shared_expert_gate=gated, **shape)
    assert (layer.shared.token_gate is not None) == gated
    assert layer.shared.w_up.shape == (D, width or 2 * F)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    leaves = [x, *layer.parameters()]
    got = layer(x).y_BSD
    shared, layer.shared = layer.shared, None
    want = layer(x).y_BSD + shared_token_by_token(shared, x.flatten(0, 1), *values).view_as(x)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_gate_is_computed_in_fp32_in_a_bf16_model():
    layer = make(torch.bfloat16)
    gate_D = torch.zeros(D)
    gate_D[:2] = torch.tensor([-8.0, -0.03125])  # whose sum rounds to -8 in bf16, and the sigmoid by 3 % with it
    with torch.no_grad():
        layer.shared.token_gate.copy_(gate_D)
    x = torch.ones(1, D, dtype=torch.bfloat16)
    ungated = super(type(layer.shared), layer.shared).forward(x, with_stats=False)[0]
    gated = layer.shared(x, with_stats=False)[0]
    assert torch.equal(gated, ungated * torch.tensor(-8.03125).sigmoid().bfloat16())


def test_without_shared_experts_there_is_no_width():
    moe = MoEConfig(num_shared_experts=0, shared_expert_hidden_size=40)
    assert shared_hidden_size(ModelConfig(moe=moe)) == 0


def test_transformers_qwen2_moe_block_with_the_same_weights_gives_the_same():
    pytest.importorskip("transformers")
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    width = 40
    layer = make(torch.float32, scale=10.0, router="softmax_topk", shared_expert_hidden_size=width)
    peer = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=D, moe_intermediate_size=F, shared_expert_intermediate_size=width, num_experts=E,
            num_experts_per_tok=A, norm_topk_prob=False, hidden_act="silu", experts_implementation="eager",
        )
    )  # fmt: skip
    peer.load_state_dict(as_qwen2_moe({name: p.detach() for name, p in layer.named_parameters()}))
    x = torch.randn(B, S, D, requires_grad=True)
    upstream = torch.randn_like(x)
    y, peer_y = layer(x).y_BSD, peer(x)
    assert_close_to_rounding("y", y, peer_y)
    ours, theirs = dict(layer.named_parameters()), dict(peer.named_parameters())
    grad_x, *grads = torch.autograd.grad(y, [x, *ours.values()], upstream)
    peer_grad_x, *peer_grads = torch.autograd.grad(peer_y, [x, *theirs.values()], upstream)
    assert_close_to_rounding("x", grad_x, peer_grad_x)
    grads = as_qwen2_moe(dict(zip(ours, grads, strict=True)))
    assert grads.keys() == theirs.keys()
    for name, peer_grad in zip(theirs, peer_grads, strict=True):
        assert_close_to_rounding(name, grads[name], peer_grad)


def as_qwen2_moe(tensors):
    """Parameters of our layer, or their gradients, by the names and in the layout of transformers' block."""
    gate_up = torch.cat((tensors["experts.w_gate"], tensors["experts.w_up"]), dim=-1)
    return {
        "gate.weight": tensors["router.weight"],
        "experts.gate_up_proj": gate_up.transpose(1, 2),
        "experts.down_proj": tensors["experts.w_down"].transpose(1, 2),
        "shared_expert.gate_proj.weight": tensors["shared.w_gate"].T,
        "shared_expert.up_proj.weight": tensors["shared.w_up"].T,
        "shared_expert.down_proj.weight": tensors["shared.w_down"].T,
        "shared_expert_gate.weight": tensors["shared.token_gate"],
    }


def assert_close_to_rounding(name, mine, theirs):
    """Two fp32 computations in different orders: some hundred roundings of the largest element."""
    error = (mine - theirs).abs().max().item()
    allowed = 100 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.2e} > allowed {allowed:.2e}"
