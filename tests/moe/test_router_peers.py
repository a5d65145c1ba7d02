"""The routers of transformers' models on the same weights: ids, weights, balance loss and gradients."""

import pytest
import torch

from qsparse_moe.config.schema import MoEConfig
from qsparse_moe.moe.losses import balance_terms, load_balance_loss
from qsparse_moe.moe.router import Router

transformers = pytest.importorskip("transformers")

E, A, D, T = 16, 4, 24, 40


def deepseek_v3(**settings):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = transformers.DeepseekV3Config(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=A, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        **settings,
    )  # fmt: skip
    return DeepseekV3TopkRouter(config)


def deepseek_v2():
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = transformers.DeepseekV2Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=A, n_group=4, topk_group=2, routed_scaling_factor=16.0,
        topk_method="group_limited_greedy", num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    return DeepseekV2TopkRouter(config)


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    return MixtralTopKRouter(transformers.MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=A))


def olmoe(renormalized):
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    config = transformers.OlmoeConfig(
        hidden_size=D, num_experts=E, num_experts_per_tok=A, norm_topk_prob=renormalized
    )  # fmt: skip
    return OlmoeTopKRouter(config)


def qwen3_moe():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = transformers.Qwen3MoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=A, norm_topk_prob=True)
    return Qwen3MoeTopKRouter(config)


GROUPS = {"num_expert_groups": 4, "groups_per_token": 2}
PEERS = {
    "DeepSeek-V3": (
        deepseek_v3,
        {"router": "sigmoid_topk_renormalized", "router_scaling_factor": 2.5, "bias_update_rate": 0.001, **GROUPS},
    ),
    "DeepSeek-V3, not renormalised": (
        lambda: deepseek_v3(norm_topk_prob=False),
        {"router": "sigmoid_topk", "router_scaling_factor": 2.5, "bias_update_rate": 0.001, **GROUPS},
    ),
    "DeepSeek-V2": (
        deepseek_v2,
        {"router": "softmax_topk", "router_scaling_factor": 16.0, "group_score": "max", **GROUPS},
    ),
    "Mixtral": (mixtral, {"router": "softmax_topk_renormalized"}),
    "Mixtral as softmax over the largest": (mixtral, {"router": "topk_softmax"}),
    "OLMoE": (lambda: olmoe(False), {"router": "softmax_topk"}),
    "OLMoE, renormalised": (lambda: olmoe(True), {"router": "softmax_topk_renormalized"}),
    "Qwen3-MoE": (qwen3_moe, {"router": "softmax_topk_renormalized"}),
}


@pytest.mark.parametrize("name", PEERS)
def test_ids_weights_and_gradients_are_those_of_transformers(name):
    build, settings = PEERS[name]
    peer, router = build(), Router(D, MoEConfig(num_experts=E, experts_per_token=A, **settings))
    with torch.no_grad():
        peer.weight.normal_()
        router.weight.copy_(peer.weight)
        if router.expert_bias is not None:
            peer.e_score_correction_bias.uniform_(-0.3, 0.3)
            router.expert_bias.copy_(peer.e_score_correction_bias)
    x = torch.randn(T, D)
    upstream_TE = torch.randn(T, E)
    results = []
    for module in (router, peer):
        x_TD = x.clone().requires_grad_()
        routing = module(x_TD)
        weights_TA, ids_TA = routing[:2] if module is router else routing[1:]
        # By expert: DeepSeek's choices are in no order.
        weights_TE = torch.zeros(T, E).scatter(-1, ids_TA, weights_TA)
        grads = torch.autograd.grad(weights_TE, (x_TD, module.weight), upstream_TE)
        results.append((weights_TE, *grads))
    assert torch.equal(results[0][0] != 0, results[1][0] != 0)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_balance_loss_is_transformers_divided_by_the_choices():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    router = Router(D, MoEConfig(num_experts=E, experts_per_token=A))
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(T, D))
    theirs = load_balancing_loss_func((routing.logits_TE,), E, A)
    ours = load_balance_loss(balance_terms(routing.probs_TE, routing.expert_ids_TA, 1))
    torch.testing.assert_close(ours, theirs / A)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, router.weight, retain_graph=True)[0] for loss in (ours, theirs / A))
    )
