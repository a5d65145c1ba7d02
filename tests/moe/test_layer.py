"""The MoE layer against a loop over tokens, with Q-Sparse at its sites. B batch, S sequence, D width."""

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.activations import ACTIVATIONS, REFERENCES
from qsparse_moe.sparsity.plan import num_selected
from qsparse_moe.sparsity.topk import topk_sparsify

B, S, D, F, E, A = 2, 5, 16, 24, 4, 2


def make(activation="relu2glu", backend="auto", shared=0, routing=None, **sparsity):
    moe = MoEConfig(
        num_experts=E, experts_per_token=A, expert_hidden_size=F, activation=activation, backend=backend,
        num_shared_experts=shared, **(routing or {}),
    )  # fmt: skip
    config = ModelConfig(hidden_size=D, num_heads=2, moe=moe, sparsity=SparsityConfig(**sparsity))
    layer = MoELayer(config).double()
    initialize(layer, config, seed=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20)  # away from zero, where many mistakes give the same result
    return layer


def set_sparsity(layer, input_values, hidden_values):
    layer.input_site.set_sparsity(input_values)
    layer.experts.hidden_site.set_sparsity(hidden_values)


def token_by_token(layer, x, activation, input_values, hidden_values, rescale="none"):
    """The layer's equation, one (token, expert) pair at a time."""
    rows = []
    seen = x.flatten(0, 1)
    if layer.router.config.router_input == "sparse":
        seen = topk_sparsify(seen, num_selected(input_values[0], D), rescale=rescale)
    routing = layer.router(seen)
    for token, row in enumerate(x.flatten(0, 1)):
        total = torch.zeros_like(row)
        for weight, expert in zip(routing.weights_TA[token], routing.expert_ids_TA[token].tolist(), strict=True):
            sparse = topk_sparsify(row, num_selected(input_values[expert], D), rescale=rescale)
            w = layer.experts
            hidden = REFERENCES[activation](sparse @ w.w_gate[expert], sparse @ w.w_up[expert])
            hidden = topk_sparsify(hidden, num_selected(hidden_values[expert], F), rescale=rescale)
            total = total + weight * (hidden @ w.w_down[expert])
        if layer.shared is not None:
            s = layer.shared
            total = total + REFERENCES[activation](row @ s.w_gate, row @ s.w_up) @ s.w_down
        rows.append(total)
    return torch.stack(rows).view_as(x)


UNIFORM = ([0.5] * E, [0.6] * E)
PER_EXPERT = ([0.0, 0.5, 0.25, 0.75], [0.9, 0.0, 0.5, 0.25])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["loop", "onednn"])
@pytest.mark.parametrize(
    "values", [([0.0] * E, [0.0] * E), UNIFORM, PER_EXPERT], ids=["dense", "uniform", "per expert"]
)
@pytest.mark.parametrize("shared", [0, 2])
def test_layer_is_the_sum_over_a_tokens_experts_in_value_and_every_gradient(activation, backend, values, shared):
    layer = make(activation, backend, shared)
    set_sparsity(layer, *values)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    leaves = [x, *layer.parameters()]
    got, want = layer(x).y_BSD, token_by_token(layer, x, activation, *values)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_rescale_reaches_the_sites():
    layer = make(rescale="preserve")
    set_sparsity(layer, *UNIFORM)
    x = torch.randn(B, S, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x).y_BSD, token_by_token(layer, x, "relu2glu", *UNIFORM, rescale="preserve"))


def test_the_router_reads_the_dense_tokens():
    layer = make()
    x = torch.randn(B, S, D, dtype=torch.float64)
    dense = layer.router(x.flatten(0, 1)).expert_ids_TA
    set_sparsity(layer, [0.9] * E, [0.9] * E)
    rows_E = layer(x).stats["router/routed_E"]
    assert torch.equal(rows_E, torch.bincount(dense.flatten(), minlength=E).double())


ROUTINGS = {
    "sparse input": {"router_input": "sparse"},
    "biases, groups, sigmoid, scaled": {
        "router": "sigmoid_topk_renormalized",
        "router_scaling_factor": 2.5,
        "num_expert_groups": 2,
        "bias_update_rate": 0.1,
    },
    "forced": {"force_uniform_routing": True},
}


@pytest.mark.parametrize("rescale", ["none", "preserve"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_every_routing_is_the_sum_over_a_tokens_experts_in_value_and_every_gradient(routing, rescale):
    layer = make("swiglu", "loop", shared=1, routing=routing, rescale=rescale)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.uniform_(-0.2, 0.2)
    set_sparsity(layer, *UNIFORM)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    leaves = [x, *layer.parameters()]
    got, want = layer(x).y_BSD, token_by_token(layer, x, "swiglu", *UNIFORM, rescale=rescale)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(out, leaves, upstream) for out in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_router_of_sparse_tokens_chooses_by_the_selected_features_and_shared_experts_read_all():
    layer, dense = make(shared=1, routing={"router_input": "sparse"}), make(shared=1)
    for one in (layer, dense):
        set_sparsity(one, [0.9] * E, [0.0] * E)
    x = torch.randn(B, S, D, dtype=torch.float64)
    selected = topk_sparsify(x.flatten(0, 1), num_selected(0.9, D))
    rows = torch.bincount(layer.router(selected).expert_ids_TA.flatten(), minlength=E).double()
    assert torch.equal(layer(x).stats["router/routed_E"], rows)
    assert not torch.equal(dense(x).stats["router/routed_E"], rows)
    assert layer(x).stats["sparsity/expert_input/rows_E"].sum() == B * S * A


def test_forced_routing_is_even_in_the_layers_sums():
    layer = make(routing={"force_uniform_routing": True})
    assert layer(torch.randn(B, 6, D, dtype=torch.float64)).stats["router/routed_E"].tolist() == [B * 6 * A / E] * E


def test_the_layer_handles_one_token_and_all_tokens_on_one_expert():
    layer = make()
    with torch.no_grad():
        layer.router.weight.zero_()
    x = torch.randn(1, 1, D, dtype=torch.float64)
    assert layer(x).stats["router/routed_E"].sum() == A
    x = torch.randn(B, S, D, dtype=torch.float64)
    assert sorted(layer(x).stats["router/routed_E"].tolist()) == [0, 0, B * S, B * S]


def test_the_layer_returns_the_sums_of_its_sites_and_its_router():
    layer = make(shared=1)
    set_sparsity(layer, [0.5] * E, [0.25] * E)
    stats = layer(torch.randn(B, S, D, dtype=torch.float64)).stats
    assert stats["router/tokens"] == B * S
    assert stats["sparsity/expert_input/rows_E"].sum() == B * S * A  # one selection, read by all experts of a token
    assert stats["sparsity/expert_input/selected_E"].sum() == B * S * A * 8
    assert stats["sparsity/expert_hidden/rows_E"].sum() == B * S * A
    assert stats["sparsity/expert_hidden/selected_E"].sum() == B * S * A * num_selected(0.25, F)
    # ReLU's zeros are among the selected features.
    assert stats["sparsity/expert_hidden/nonzero_E"].sum() < stats["sparsity/expert_hidden/selected_E"].sum()
    set_sparsity(layer, *PER_EXPERT)
    stats = layer(torch.randn(B, S, D, dtype=torch.float64)).stats
    assert stats["sparsity/expert_input/rows_E"].sum() == B * S * A  # now each routed row has its own K
    quiet = layer(torch.randn(B, S, D, dtype=torch.float64), with_stats=False).stats
    assert list(quiet) == ["router/routed_E"]


def test_the_balance_loss_is_the_same_however_whole_sequences_are_divided_into_batches():
    layer = make()
    x = torch.randn(4, S, D, dtype=torch.float64)
    whole = layer(x).load_balance_loss
    halves = [layer(part).load_balance_loss for part in x.split(2)]
    torch.testing.assert_close(whole, sum(halves) / 2)


@pytest.mark.parametrize("values", [UNIFORM, PER_EXPERT], ids=["uniform", "per expert"])
def test_sums_by_expert_are_those_of_the_tokens_that_each_expert_reads(values):
    layer = make(shared=1)
    set_sparsity(layer, *values)
    x = torch.randn(B, S, D, dtype=torch.float64)
    stats = layer(x).stats
    chosen = layer.router(x.flatten(0, 1)).expert_ids_TA
    for expert in range(E):
        tokens = (chosen == expert).any(-1).nonzero().flatten().tolist()
        selected = topk_sparsify(x.flatten(0, 1)[tokens], num_selected(values[0][expert], D))
        site = {name: value[expert] for name, value in stats.items() if name.startswith("sparsity/expert_input/")}
        assert site["sparsity/expert_input/rows_E"] == len(tokens)
        assert site["sparsity/expert_input/kept_energy_E"].item() == pytest.approx(selected.square().sum().item())
        assert torch.equal(site["sparsity/expert_input/used_ED"], (selected != 0).any(0))
        neighbours = [(i, j) for i, j in enumerate(tokens[1:]) if tokens[i] + 1 == j and j % S]
        common = sum(((selected[i] != 0) & (selected[i + 1] != 0)).sum().item() for i, _ in neighbours)
        assert site["sparsity/expert_input/pairs_common_E"] == common
        assert site["sparsity/expert_input/pairs_nonzero_E"] == sum(
            (selected[i] != 0).sum().item() for i, _ in neighbours
        )
    assert stats["sparsity/shared_input/pairs_nonzero_E"] == B * (S - 1) * D
