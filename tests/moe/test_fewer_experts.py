"""A router that uses fewer of its A choices: the first ones, or as many as reach a share of the weight, or none."""

import math

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.kernels import tiles
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.losses import balance_terms, load_balance_loss
from qsparse_moe.moe.router import UNUSED, Router, within_share
from qsparse_moe.nn.activations import REFERENCES

E, A, D, F, T = 6, 4, 8, 12, 20
KINDS = ("softmax_topk", "softmax_topk_renormalized", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalized")
MODES = ("router", "kept", "renormalized")


def settings(kind="softmax_topk_renormalized", mode="router", most=A, **others):
    names = {"num_experts": E, "experts_per_token": most, "expert_hidden_size": F, "activation": "swiglu"}
    return MoEConfig(router=kind, fewer_experts_weights=mode, **names, **others)


def router_of(config, weight):
    router = Router(weight.shape[1], config).to(weight.dtype)
    with torch.no_grad():
        router.weight.copy_(weight)
    return router.eval()


def layer_of(config, seed=1, width=D):
    model = ModelConfig(hidden_size=width, num_heads=2, moe=config)
    layer = MoELayer(model).double()
    initialize(layer, model, seed=seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20)  # away from zero, where many mistakes give the same result
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "others", [{}, {"num_expert_groups": 2, "bias_update_rate": 0.1}, {"force_uniform_routing": True}], ids=str
)
def test_fewer_experts_are_those_and_have_the_weights_of_a_router_that_chooses_fewer(kind, others):
    weight, x = torch.randn(E, D), torch.randn(T, D)
    router = router_of(settings(kind, **others, groups_per_token=2 if "num_expert_groups" in others else 1), weight)
    for number in range(1, A + 1):
        smaller = router_of(
            settings(kind, most=number, **others, groups_per_token=2 if len(others) == 2 else 1), weight
        )
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E))
            smaller.expert_bias.copy_(router.expert_bias)
        router.use_experts(number)
        got, want = router(x), smaller(x)
        assert torch.equal(got.expert_ids_TA, want.expert_ids_TA) and torch.equal(got.weights_TA, want.weights_TA)
        assert got.used_TA is None


BY_HAND = {
    ("softmax_topk", "router"): [0.4, 0.3],
    ("softmax_topk", "kept"): [0.4, 0.3],
    ("softmax_topk", "renormalized"): [0.9 * 4 / 7, 0.9 * 3 / 7],
    ("softmax_topk_renormalized", "router"): [4 / 7, 3 / 7],
    ("softmax_topk_renormalized", "kept"): [4 / 9, 3 / 9],
    ("softmax_topk_renormalized", "renormalized"): [4 / 7, 3 / 7],
    ("topk_softmax", "router"): [4 / 7, 3 / 7],
    ("topk_softmax", "kept"): [4 / 9, 3 / 9],
    ("topk_softmax", "renormalized"): [4 / 7, 3 / 7],
}


@pytest.mark.parametrize("top_p", [None, 7 / 9])
@pytest.mark.parametrize(("kind", "mode"), BY_HAND)
def test_weights_of_two_of_three_experts_by_hand(kind, mode, top_p):
    # The softmax of these logits is 0.1, 0.4, 0.2, 0.3, so that the three choices are the experts 1, 3, and 2.
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64).log()
    config = MoEConfig(num_experts=4, experts_per_token=3, router=kind, fewer_experts_weights=mode)
    router = router_of(config, torch.eye(4, dtype=torch.float64))
    router.use_experts(*((2,) if top_p is None else (3, top_p - 1e-9)))
    got = router(logits)
    assert got.expert_ids_TA[0, :2].tolist() == [1, 3]
    torch.testing.assert_close(got.weights_TA[0, :2], torch.tensor(BY_HAND[kind, mode], dtype=torch.float64))
    if top_p is not None:
        assert got.used_TA[0].tolist() == [True, True, False] and got.weights_TA[0, 2] == 0


def used_by_loop(weights_A, top_p, number):
    """The first experts until their weights reach the share, in Python's own numbers."""
    total, reached, used = math.fsum(weights_A), 0.0, 0
    while used < min(number, len(weights_A)) and (used == 0 or reached < top_p * total):
        reached += weights_A[used]
        used += 1
    return used


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [A, 3])
def test_top_p_is_a_loop_over_tokens(kind, mode, number):
    # Most logits are negative, where the sigmoids of a token differ as much as its softmax does.
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(E, D, dtype=torch.float64, generator=random) - 0.5
    x = torch.randn(T, D, dtype=torch.float64, generator=random).abs()
    full = router_of(settings(kind, mode), weight)
    router = router_of(settings(kind, mode), weight)
    every = full(x)
    seen = []
    router.hook = seen.append
    router.use_experts(number, 0.7)
    got = router(x)
    counts = [used_by_loop(row.tolist(), 0.7, number) for row in every.weights_TA]
    assert len(set(counts)) > 1, "the share should leave tokens with different numbers of experts"
    for token, count in enumerate(counts):
        ids, weights = every.expert_ids_TA[token, :count], every.weights_TA[token, :count]
        assert got.used_TA[token].tolist() == [True] * count + [False] * (number - count)
        assert seen[0][token].tolist() == ids.tolist() + [UNUSED] * (number - count)
        if mode == "renormalized":
            weights = weights * every.weights_TA[token].sum() / weights.sum()
        elif mode == "router":
            weights = router_of(settings(kind, most=count), weight)(x).weights_TA[token]
        torch.testing.assert_close(got.weights_TA[token, :count], weights)
        assert not got.weights_TA[token, count:].any()


def test_the_first_expert_is_used_even_if_all_weights_are_zero_and_a_share_of_one_keeps_all():
    weights = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.9, 0.1]])
    assert within_share(weights, 0.5).tolist() == [[True, False], [True, False], [True, False]]
    assert within_share(weights, 0.95).tolist() == [[True, False], [True, True], [True, True]]


@pytest.mark.parametrize("number_top_p", [(2, 1.0), (A, 0.6), (3, 0.6)], ids=str)
@pytest.mark.parametrize("backend", ["loop", "onednn"])
def test_the_layer_is_the_sum_over_the_experts_that_a_token_uses_in_value_and_every_gradient(number_top_p, backend):
    layer = layer_of(settings(backend=backend, num_shared_experts=1))
    layer.router.use_experts(*number_top_p)
    with torch.no_grad():
        layer.router.weight.mul_(0.05)  # weights of the same size, so that 0.6 needs from two to four experts
    x = torch.randn(2, T // 2, D, dtype=torch.float64, requires_grad=True)
    routing, rows = layer.router(x.flatten(0, 1)), []
    for token, row in enumerate(x.flatten(0, 1)):
        s, total = layer.shared, torch.zeros_like(row)
        for choice, (weight, e) in enumerate(zip(routing.weights_TA[token], routing.expert_ids_TA[token], strict=True)):
            if routing.used_TA is None or routing.used_TA[token, choice]:
                w = layer.experts
                total = total + weight * (REFERENCES["swiglu"](row @ w.w_gate[e], row @ w.w_up[e]) @ w.w_down[e])
        rows.append(total + REFERENCES["swiglu"](row @ s.w_gate, row @ s.w_up) @ s.w_down)
    got, want, leaves = layer(x), torch.stack(rows).view_as(x), [x, *layer.parameters()]
    torch.testing.assert_close(got.y_BSD, want)
    upstream = torch.randn_like(x)
    grads = [torch.autograd.grad(y, leaves, upstream, materialize_grads=True) for y in (got.y_BSD, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    used = torch.ones_like(routing.weights_TA) if routing.used_TA is None else routing.used_TA.double()
    assert got.stats["router/routed_E"].sum() == used.sum() == got.stats["sparsity/expert_hidden/rows_E"].sum()


@pytest.mark.parametrize("number_top_p", [(2, 1.0), (3, 0.6), (0, 1.0)], ids=str)
@pytest.mark.parametrize("backend", ["grouped", "blas", "native", "megablocks"])
def test_every_backend_agrees_with_the_loop_in_output_and_every_gradient(backend, number_top_p):
    if backend == "megablocks" and (reason := tiles.why_not(torch.device("cpu"))):
        pytest.skip(reason)
    x, found = torch.randn(2, 4, 2 * D), []
    for name in ("loop", backend):
        moe = settings(backend=name).model_copy(update={"expert_hidden_size": 16})
        layer = layer_of(moe, width=2 * D).float().train()
        layer.router.use_experts(*number_top_p)
        with torch.no_grad():
            layer.router.weight.mul_(0.05)
        leaf = x.clone().requires_grad_()
        y = layer(leaf).y_BSD
        upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
        found.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], upstream, materialize_grads=True)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.detach().abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("shared", [0, 1])
def test_a_layer_without_experts_is_its_shared_experts_and_its_experts_get_a_gradient_of_zero(shared):
    layer = layer_of(settings(num_shared_experts=shared)).train()
    layer.router.use_experts(0)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    want = layer.shared(x, with_stats=False)[0] if shared else torch.zeros_like(x)
    assert torch.equal(out.y_BSD, want)
    assert out.load_balance_loss == 0 and out.router_z_loss > 0 and not out.stats["router/routed_E"].any()
    (out.y_BSD.sum() + out.load_balance_loss + out.router_z_loss).backward()
    assert all(not p.grad.any() for p in layer.experts.parameters()) and layer.router.weight.grad.any()


def test_the_capacity_drops_only_choices_that_are_used():
    layer = layer_of(settings(capacity_factor=0.5)).train()
    layer.router.use_experts(3, 0.6)
    x = torch.randn(2, T // 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out, routing = layer(x), layer.router(x.flatten(0, 1))
    capacity = math.ceil(0.5 * T * 3 / E)
    used_E = torch.bincount(routing.expert_ids_TA[routing.used_TA], minlength=E)
    assert torch.equal(out.stats["router/routed_E"], used_E.double())
    assert torch.equal(out.stats["router/dropped_E"], (used_E - capacity).clamp(min=0).double())
    assert out.stats["router/dropped_E"].any()
    layer.router.use_experts(0)
    assert layer(x).stats["router/dropped_E"].tolist() == [0] * E


def test_the_load_balance_loss_counts_the_experts_that_tokens_use():
    probs, ids = torch.randn(6, E).softmax(-1), torch.randint(E, (6, 2))
    used = torch.tensor([[True, False], [True, True], [True, False], [True, True], [True, False], [True, False]])
    terms = balance_terms(probs, ids, 2, used_TA=used)
    for group in (0, 1):
        part = slice(3 * group, 3 * group + 3)
        assert torch.equal(terms.routed_GE[group], torch.bincount(ids[part][used[part]], minlength=E).double())
    shares = terms.routed_GE / torch.tensor([[4.0], [4.0]])
    want = E * (shares * terms.probs_GE).sum(-1).mean()
    torch.testing.assert_close(load_balance_loss(terms).double(), want)
