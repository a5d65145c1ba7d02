"""The capacity factor: dropped tokens, their absence from outputs and gradients, and their counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.kernels import tiles
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.backends import megablocks
from qsparse_moe.moe.capacity import expert_capacity, within_capacity, within_capacity_reference
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.permutation import GATHERS, combine, combine_reference, permute, permute_reference, sort_by_expert
from qsparse_moe.nn.activations import REFERENCES
from qsparse_moe.sparsity.plan import num_selected
from qsparse_moe.sparsity.topk import topk_sparsify

B, S, D, F, E, A = 2, 8, 16, 24, 4, 2
T = B * S


@pytest.mark.parametrize(
    ("factor", "num_choices", "capacity"),
    [(1.0, 32, 8), (1.0, 33, 9), (1.25, 32, 10), (0.01, 32, 1), (1.1, 400, 110), (0.7, 40, 7), (1e-5, 1, 1)],
)
def test_capacity_is_the_exact_ceiling(factor, num_choices, capacity):
    assert expert_capacity(factor, num_choices, E) == capacity


def test_a_float_product_would_give_one_token_more():
    assert math.ceil(1.1 * 400 / E) == 111  # what the exact ceiling is for


@given(
    st.integers(1, 4).flatmap(
        lambda choices: st.lists(
            st.tuples(
                st.permutations(range(6)).map(lambda order: order[:choices]),
                st.lists(st.sampled_from([0.125, 0.25, 0.5]), min_size=choices, max_size=choices),
            ),
            min_size=1,
            max_size=12,
        )
    ),
    st.integers(1, 13),
)
def test_sorting_finds_the_tokens_of_the_definition_including_ties(tokens, capacity):
    ids_TA = torch.tensor([ids for ids, _ in tokens])
    weights_TA = torch.tensor([weights for _, weights in tokens])
    within_TA = within_capacity(weights_TA, ids_TA, capacity)
    assert torch.equal(within_TA, within_capacity_reference(weights_TA, ids_TA, capacity))
    loads = torch.bincount(ids_TA.flatten(), minlength=6)
    assert torch.equal(torch.bincount(ids_TA[within_TA], minlength=6), loads.clamp(max=capacity))


def test_tokens_with_the_largest_weights_are_within_capacity_and_of_equal_ones_the_first():
    weights_TA = torch.tensor([[0.4, 0.1], [0.5, 0.2], [0.5, 0.2], [0.5, 0.3]])
    ids_TA = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    want = [[False, False], [True, True], [True, False], [False, True]]
    for kept in (within_capacity, within_capacity_reference):
        assert kept(weights_TA, ids_TA, 2).tolist() == want


def test_permute_and_combine_leave_out_dropped_tokens_in_value_and_every_gradient():
    ids_TA = torch.tensor([[0, 2], [3, 0], [2, 0], [0, 2]])
    within_TA = torch.tensor([[True, False], [True, False], [False, True], [False, False]])
    dispatch = sort_by_expert(ids_TA, 4, within_TA)
    assert dispatch.expert_N.tolist() == [0, 0, 3]
    assert dispatch.token_N.tolist() == [0, 2, 1]
    assert dispatch.tokens_per_expert_E.tolist() == [2, 0, 0, 1]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    up_rows, up_tokens = (torch.randn(n, 6, dtype=torch.float64) for n in (3, 4))
    results = []
    for gather, add in ((permute, combine), (permute_reference, combine_reference)):
        rows = gather(x, dispatch)
        y = add(rows.sin(), weights, dispatch)
        results.append((rows, y, *torch.autograd.grad((rows, y), (x, weights), (up_rows, up_tokens))))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    _, y, grad_x, grad_weights = results[0]
    assert (y[3] == 0).all() and (grad_x[3] == 0).all()
    assert torch.equal(grad_weights != 0, within_TA)


def test_every_permutation_drops_the_same_tokens():
    if reason := tiles.why_not(torch.device("cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    ids_TA = torch.stack([torch.randperm(E)[:A] for _ in range(T)])
    within_TA = torch.rand(T, A) < 0.6
    # MegaBlocks has no fp64.
    x = torch.randn(T, D, requires_grad=True)
    weights = torch.rand(T, A, requires_grad=True)
    up_rows = torch.randn(int(within_TA.sum()), D)
    up_tokens = torch.randn(T, D)
    results = []
    for permutation in (megablocks.PERMUTATION, GATHERS):
        routed = permutation.sort(ids_TA, E, within_TA)
        rows = permutation.permute(x, routed)
        y = permutation.combine(rows.sin(), weights, routed)
        grads = torch.autograd.grad((rows, y), (x, weights), (up_rows, up_tokens))
        results.append((routed.token_N, routed.expert_N, routed.tokens_per_expert_E, rows, y, *grads))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False)
    assert torch.equal(results[0][-1] != 0, within_TA)


def make(factor, backend="loop", activation="relu2glu", shared=0, dtype=torch.float64):
    moe = MoEConfig(
        num_experts=E, experts_per_token=A, expert_hidden_size=F, activation=activation, backend=backend,
        num_shared_experts=shared, capacity_factor=factor, router="softmax_topk",
    )  # fmt: skip
    config = ModelConfig(hidden_size=D, num_heads=2, moe=moe)
    layer = MoELayer(config).to(torch.float64)
    initialize(layer, config, seed=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20)
    return layer.to(dtype)


def set_sparsity(layer, input_values, hidden_values):
    layer.input_site.set_sparsity(input_values)
    layer.experts.hidden_site.set_sparsity(hidden_values)


def token_by_token(layer, x, activation, factor, input_values, hidden_values):
    """The layer's equation: every expert in turn serves its C most wanted tokens, the others go without it."""
    x_TD = x.flatten(0, 1)
    routing = layer.router(x_TD)
    capacity = math.ceil(factor * T * A / E)
    totals = [torch.zeros(D, dtype=x.dtype) for _ in range(T)]
    num_dropped = [0] * E
    for expert in range(E):
        takers = [
            (-w.item(), t, w)
            for t in range(T)
            for w, e in zip(routing.weights_TA[t], routing.expert_ids_TA[t].tolist(), strict=True)
            if e == expert
        ]
        takers.sort(key=lambda taker: taker[:2])
        num_dropped[expert] = max(0, len(takers) - capacity)
        for _, token, weight in takers[:capacity]:
            w = layer.experts
            sparse = topk_sparsify(x_TD[token], num_selected(input_values[expert], D))
            hidden = REFERENCES[activation](sparse @ w.w_gate[expert], sparse @ w.w_up[expert])
            hidden = topk_sparsify(hidden, num_selected(hidden_values[expert], F))
            totals[token] = totals[token] + weight * (hidden @ w.w_down[expert])
    return torch.stack(totals).view_as(x), num_dropped


UNIFORM = ([0.5] * E, [0.6] * E)
PER_EXPERT = ([0.0, 0.5, 0.25, 0.75], [0.9, 0.0, 0.5, 0.25])


@pytest.mark.parametrize("backend", ["loop", "onednn"])
@pytest.mark.parametrize(
    "values", [([0.0] * E, [0.0] * E), UNIFORM, PER_EXPERT], ids=["dense", "uniform", "per expert"]
)
@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0])
def test_the_layer_is_the_sum_over_tokens_within_capacity_in_value_and_every_gradient(backend, values, factor):
    torch.manual_seed(
        0
    )  # with inputs for which a factor of 1 drops some tokens: even loads would leave nothing to test
    layer = make(factor, backend)
    set_sparsity(layer, *values)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    leaves = [x, *layer.parameters()]
    out = layer(x)
    want, num_dropped = token_by_token(layer, x, "relu2glu", factor, *values)
    assert sum(num_dropped) > 0
    torch.testing.assert_close(out.y_BSD, want)
    assert out.stats["router/dropped_E"].tolist() == num_dropped
    grads = [torch.autograd.grad(y, leaves, upstream) for y in (out.y_BSD, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("values", [UNIFORM, PER_EXPERT], ids=["uniform", "per expert"])
def test_grouped_products_agree_with_the_loop_over_experts(values):
    x = torch.randn(B, S, D)
    upstream = torch.randn_like(x)
    results = []
    for backend, dtype in (("grouped", torch.float32), ("loop", torch.float64)):
        layer = make(0.5, backend, dtype=dtype)
        set_sparsity(layer, *values)
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf).y_BSD
        results.append((y, *torch.autograd.grad(y, [leaf, *layer.parameters()], upstream.to(dtype))))
    for mine, exact in zip(*results, strict=True):
        error, largest = (mine.double() - exact).abs().max().item(), exact.abs().max().item()
        assert error <= 100 * torch.finfo(torch.float32).eps * largest


def all_on_one_expert(layer):
    """Every token with a positive first feature chooses expert 2, and then expert 0."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2, 0], layer.router.weight[0, 0] = 2.0, 1.0


def test_if_all_tokens_choose_one_expert_it_computes_its_capacity_and_drops_the_rest():
    layer = make(1.0)
    all_on_one_expert(layer)
    x = torch.randn(B, S, D, dtype=torch.float64)
    x[..., 0] = torch.linspace(1.0, 2.0, T, dtype=torch.float64).view(B, S)  # the later, the surer
    out = layer(x)
    assert out.stats["router/routed_E"].tolist() == [T, 0, T, 0]  # the requested capacity
    assert out.stats["router/dropped_E"].tolist() == [T / 2, 0, T / 2, 0]
    for site in ("expert_input", "expert_hidden"):  # what was computed
        assert out.stats[f"sparsity/{site}/rows_E"].tolist() == [T / 2, 0, T / 2, 0]
    # Expert 2 takes the half with the largest weights, the last tokens; expert 0, whose weights fall, the first.
    routing = layer.router(x.flatten(0, 1))
    within_TA = within_capacity(routing.weights_TA, routing.expert_ids_TA, T // 2)
    assert within_TA[:, 0].tolist() == [False] * (T // 2) + [True] * (T // 2)
    assert within_TA[:, 1].tolist() == [True] * (T // 2) + [False] * (T // 2)
    layer.capacity_factor = 0.1  # C = 1
    y_TD = layer(x).y_BSD.flatten(0, 1)
    assert (y_TD[1:-1] == 0).all()
    assert (y_TD[0] != 0).any() and (y_TD[-1] != 0).any()


def test_a_dropped_token_still_has_its_shared_experts():
    layer = make(0.1, shared=1)
    all_on_one_expert(layer)
    x = torch.randn(B, S, D, dtype=torch.float64)
    x[..., 0] = torch.linspace(1.0, 2.0, T, dtype=torch.float64).view(B, S)
    shared_TD = layer.shared(x.flatten(0, 1), with_stats=False)[0]
    torch.testing.assert_close(layer(x).y_BSD.flatten(0, 1)[1:-1], shared_TD[1:-1])


def test_a_capacity_for_all_tokens_changes_nothing():
    roomy, dropless = make(E / A), make(None)
    x = torch.randn(B, S, D, dtype=torch.float64)
    out = roomy(x)
    assert torch.equal(out.y_BSD, dropless(x).y_BSD)
    assert out.stats["router/dropped_E"].tolist() == [0] * E
    assert "router/dropped_E" not in dropless(x).stats


def test_evaluation_drops_nothing():
    layer = make(0.1)
    x = torch.randn(B, S, D, dtype=torch.float64)
    trained = layer(x).y_BSD
    out = layer.eval()(x)
    assert torch.equal(out.y_BSD, make(None)(x).y_BSD) and not torch.equal(out.y_BSD, trained)
    assert "router/dropped_E" not in out.stats


def test_both_losses_are_those_of_the_choices_before_the_drop():
    x = torch.randn(B, S, D, dtype=torch.float64)
    dropping, dropless = make(0.1)(x), make(None)(x)
    assert torch.equal(dropping.load_balance_loss, dropless.load_balance_loss)
    assert torch.equal(dropping.router_z_loss, dropless.router_z_loss)
    assert torch.equal(dropping.stats["router/routed_E"], dropless.stats["router/routed_E"])
