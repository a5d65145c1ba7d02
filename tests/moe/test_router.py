"""The router's scores, choices, weights and sums against loops over tokens in float64."""

import math

import pytest
import torch

from qsparse_moe.config.schema import MoEConfig
from qsparse_moe.moe.router import Router, Routing, bias_update_rate, chosen_groups, round_robin, router_stats
from qsparse_moe.sparsity.log_counts import PROBABILITIES

E, A, D, T = 8, 3, 8, 10
KINDS = ("softmax_topk", "softmax_topk_renormalized", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalized")
GROUPS = {
    "no groups": {},
    "the two best of 4 groups by their two best": {"num_expert_groups": 4, "groups_per_token": 2},
    "3 of 4 groups by their best": {"num_expert_groups": 4, "groups_per_token": 3, "group_score": "max"},
    "all groups": {"num_expert_groups": 2, "groups_per_token": 2},
}


def make(kind="softmax_topk", dtype=torch.float64, *, training=False, **settings):
    config = MoEConfig(num_experts=E, experts_per_token=A, router=kind, **settings)
    router = Router(D, config).to(dtype).train(training)
    torch.nn.init.normal_(router.weight)
    return router


def route_one_token(x, weight, kind, bias, groups, scaling):
    """The equations for one token, expert by expert, in Python's own numbers where nothing is differentiated."""
    logits = [sum(x[i] * weight[e, i] for i in range(D)) for e in range(E)]
    if kind.startswith("sigmoid"):
        scores = [1 / (1 + torch.exp(-z)) for z in logits]
    else:
        scores = [torch.exp(z) / sum(torch.exp(other) for other in logits) for z in logits]
    choice = [s.item() + b for s, b in zip(scores, bias, strict=True)]
    allowed = range(E)
    if groups:
        size = E // groups["num_expert_groups"]
        members = [range(g * size, (g + 1) * size) for g in range(groups["num_expert_groups"])]
        best = 1 if groups.get("group_score") == "max" else 2
        values = [sum(sorted((choice[e] for e in group), reverse=True)[:best]) for group in members]
        order = sorted(range(len(members)), key=lambda g: -values[g])[: groups["groups_per_token"]]
        allowed = [e for g in order for e in members[g]]
    ids = sorted(allowed, key=lambda e: -choice[e])[:A]
    if kind == "topk_softmax":
        exps = [torch.exp(logits[e]) for e in ids]
        weights = [value / sum(exps) for value in exps]
    else:
        weights = [scores[e] for e in ids]
        if kind.endswith("renormalized"):
            weights = [w / sum(weights) for w in weights]
    probs = [s / sum(scores) for s in scores]
    return torch.stack(weights) * scaling, ids, torch.stack(probs), torch.stack(logits)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_matches_its_equations_in_value_and_every_gradient(kind, groups, biased):
    router = make(kind, bias_update_rate=0.1 if biased else 0.0, router_scaling_factor=2.5, **groups)
    bias = torch.linspace(-0.4, 0.4, E)[torch.randperm(E)] if biased else torch.zeros(E)
    if biased:
        router.expert_bias.copy_(bias)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    got = router(x)
    by_token = [route_one_token(row, router.weight, kind, bias.tolist(), groups, 2.5) for row in x]
    weights, ids, probs, logits = zip(*by_token, strict=True)
    assert got.expert_ids_TA.tolist() == list(ids)
    want = tuple(map(torch.stack, (weights, probs, logits)))
    have = (got.weights_TA, got.probs_TE, got.logits_TE)
    upstream = [torch.randn_like(value) for value in want]
    for mine, theirs in zip(have, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(
        torch.autograd.grad(have, (x, router.weight), upstream),
        torch.autograd.grad(want, (x, router.weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_bias_moves_the_choice_and_not_the_weights():
    router = make("sigmoid_topk", bias_update_rate=0.1)
    x = torch.randn(T, D, dtype=torch.float64)
    router.expert_bias[5] = 10.0
    routing = router(x)
    assert (routing.expert_ids_TA[:, 0] == 5).all()
    torch.testing.assert_close(routing.weights_TA[:, 0], routing.logits_TE[:, 5].sigmoid())
    router.expert_bias[5] = -10.0
    assert (router(x).expert_ids_TA != 5).all()


def test_groups_limit_the_experts_of_a_token():
    groups = make("sigmoid_topk", num_expert_groups=4, groups_per_token=2)(torch.randn(200, D).double())
    assert all(len(set(ids)) <= 2 for ids in (groups.expert_ids_TA // 2).tolist())
    free = make("sigmoid_topk")(torch.randn(200, D).double())
    assert any(len(set(ids)) > 2 for ids in (free.expert_ids_TA // 2).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_scores_and_weights_are_fp32_under_a_bf16_model(kind):
    router = make(kind, torch.bfloat16, bias_update_rate=0.1, training=True, router_noise=0.1, router_jitter=0.1)
    x = torch.randn(T, D).bfloat16()
    routing = router(x)
    assert {t.dtype for t in (routing.weights_TA, routing.probs_TE, routing.logits_TE)} == {torch.float32}
    router.eval()
    torch.testing.assert_close(router(x).logits_TE, x.float() @ router.weight.float().T)


def test_scores_that_round_to_one_or_to_zero_are_still_distinguished():
    router = make("sigmoid_topk_renormalized", torch.float32)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    x = torch.tensor([[20.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0]])
    assert router(x).expert_ids_TA.tolist() == [[7, 6, 5]]
    x = (-10 * x).requires_grad_()  # every sigmoid is 0
    routing = router(x)
    assert routing.expert_ids_TA.tolist() == [[0, 1, 2]]
    (routing.weights_TA.sum() + routing.probs_TE.sum()).backward()
    assert all(value.isfinite().all() for value in (routing.weights_TA, routing.probs_TE, x.grad, router.weight.grad))


def test_jitter_multiplies_the_routers_input_in_training_only():
    router = make(router_jitter=0.3, training=True)
    x = torch.randn(500, D, dtype=torch.float64)
    torch.manual_seed(1)
    noisy = router(x).logits_TE
    torch.manual_seed(1)
    factor = torch.empty_like(x).uniform_(0.7, 1.3)
    torch.testing.assert_close(noisy, (x * factor) @ router.weight.T)
    assert not torch.equal(router(x).logits_TE, noisy)
    torch.testing.assert_close(router.eval()(x).logits_TE, x @ router.weight.T)


def test_noise_is_added_to_the_logits_in_training_only_and_determines_scores_choices_and_losses():
    router = make(router_noise=0.5, training=True)
    x = torch.randn(5000, D, dtype=torch.float64)
    routing = router(x)
    clean = x @ router.weight.T
    noise = routing.logits_TE - clean
    assert noise.std().item() == pytest.approx(0.5, rel=0.02) and abs(noise.mean().item()) < 0.02
    torch.testing.assert_close(routing.probs_TE, routing.logits_TE.softmax(-1))
    assert torch.equal(routing.expert_ids_TA, routing.logits_TE.topk(A).indices)
    torch.testing.assert_close(router.eval()(x).logits_TE, clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 8, 11])
def test_forced_routing_is_even_and_leaves_every_gradient(kind, num_tokens):
    router = make(kind, force_uniform_routing=True)
    x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    routing = router(x)
    assert routing.expert_ids_TA.tolist() == [[(t * A + a) % E for a in range(A)] for t in range(num_tokens)]
    rows = torch.bincount(routing.expert_ids_TA.flatten(), minlength=E)
    assert rows.max() - rows.min() <= 1
    scores = routing.logits_TE.sigmoid() if kind.startswith("sigmoid") else routing.probs_TE
    chosen = scores.gather(-1, routing.expert_ids_TA)
    is_whole = kind in ("softmax_topk", "sigmoid_topk")
    torch.testing.assert_close(routing.weights_TA, chosen if is_whole else chosen / chosen.sum(-1, keepdim=True))
    grads = torch.autograd.grad(routing.weights_TA, (x, router.weight), torch.randn_like(routing.weights_TA))
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_biases_move_by_the_rate_towards_an_even_load():
    router = make(bias_update_rate=0.25)
    assert router.expert_bias.tolist() == [0.0] * E
    rows = torch.tensor([9.0, 1, 5, 5, 8, 2, 6, 4], dtype=torch.float64)
    router.update_bias(rows, 0.25)
    assert router.expert_bias.tolist() == [-0.25, 0.25, 0.0, 0.0, -0.25, 0.25, -0.25, 0.25]
    router.update_bias(rows, 0.5)
    assert router.expert_bias.tolist() == [-0.75, 0.75, 0.0, 0.0, -0.75, 0.75, -0.75, 0.75]


def test_biases_move_by_the_rate_however_near_or_far_from_the_mean_a_load_is():
    router = make(bias_update_rate=0.25)
    rows = torch.tensor([4.0, 5, 4, 5, 36, 0, -17.5, 4.5], dtype=torch.float64)
    rows[6] = 4 * 9 - rows[[0, 1, 2, 3, 4, 5, 7]].sum()  # a mean of 4.5
    assert rows.mean() == 4.5
    router.update_bias(rows, 0.25)
    assert router.expert_bias.tolist() == [0.25, -0.25, 0.25, -0.25, -0.25, 0.25, 0.25, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_biases_are_fp32_state_through_every_cast_and_no_parameter(dtype):
    router = make(dtype=torch.float32, bias_update_rate=1e-3)
    router.expert_bias.copy_(1 + torch.arange(E) * 1e-3)  # steps that bf16 would swallow
    before = router.expert_bias.clone()
    assert "expert_bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    cast = torch.nn.Sequential(router).to(dtype)[0]
    assert cast.weight.dtype == dtype and cast.expert_bias.dtype == torch.float32 and cast.expert_bias.equal(before)
    assert cast.state_dict()["expert_bias"].equal(before)
    assert "expert_bias" not in make().state_dict()


def test_biases_stay_constant_after_the_steps_that_move_them():
    config = MoEConfig(bias_update_rate=0.001, bias_update_steps=3)
    assert [bias_update_rate(config, step) for step in range(5)] == [0.001] * 3 + [0.0] * 2
    assert bias_update_rate(MoEConfig(bias_update_rate=0.001), 10**9) == 0.001
    assert bias_update_rate(MoEConfig(), 0) == 0.0
    assert bias_update_rate(MoEConfig(bias_update_rate=0.001, bias_update_steps=0), 0) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_over_tokens_and_of_probabilities_for_every_kind(kind):
    routing = make(kind, router_scaling_factor=2.0)(torch.randn(T, D).double())
    stats = router_stats(routing)
    assert stats["tokens"] == T
    assert stats["probability_E"].sum().item() == pytest.approx(T, rel=1e-6)
    entropy = torch.distributions.Categorical(probs=routing.probs_TE).entropy().sum()
    assert stats["choice_entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert 0 < stats["choice_entropy"] / T < math.log(E)
    assert stats["first_weight"].item() == pytest.approx(routing.weights_TA.max(-1).values.sum().item(), rel=1e-6)


def test_sums_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]])
    stats = router_stats(Routing(torch.tensor([[3.0, 1.0], [0.5, 2.0]]), torch.zeros(2, 2), probs, probs))
    assert stats["probability_E"].tolist() == [0.5, 0.25, 1.25, 0.0]
    assert (stats["tokens"].item(), stats["first_weight"].item()) == (2, 3.5)
    assert stats["choice_entropy"].item() == pytest.approx(1.5 * math.log(2), rel=1e-6)
    counts = stats["probability_counts_H"]
    at_quarter, at_half = (PROBABILITIES.edges.index(exponent) for exponent in (-2.0, -1.0))
    found = {index: counts[index].item() for index in counts.nonzero().flatten().tolist()}
    # Four zeros in the first bin, and 1 in the last one.
    assert found == {0: 4, at_quarter: 2, at_half: 1, len(counts) - 1: 1}


@pytest.mark.parametrize(
    ("score", "number", "groups"),
    # The groups have the largest values 9, 6, 7 and the sums of two 10, 12, 11.
    [("max", 1, [0]), ("max", 2, [0, 2]), ("top2_sum", 1, [1]), ("top2_sum", 2, [1, 2]), ("max", 3, [0, 1, 2])],
)
def test_groups_by_their_best_or_by_their_two_best(score, number, groups):
    values = torch.tensor([[1.0, 9.0, 0.0, 6.0, 5.0, 6.0, 4.0, 3.0, 7.0]])
    allowed = chosen_groups(values, 3, number, score)
    assert allowed.tolist() == [[expert // 3 in groups for expert in range(9)]]
    # Every token has groups of its own.
    both = chosen_groups(torch.cat((values.roll(3, dims=-1), values)), 3, number, score)
    assert torch.equal(both, torch.cat((allowed.roll(3, dims=-1), allowed)))


def test_forced_choices_go_on_where_the_last_token_ended():
    found = round_robin(4, 3, 5, device=torch.device("cpu"))
    assert found.tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
