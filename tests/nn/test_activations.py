"""Activations: values and gradients against their definitions, memory, natural zeros, experts without a gate."""

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.model.init import initialize
from qsparse_moe.model.transformer import build_model
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.nn.activations import ACTIVATIONS, REFERENCES, UNGATED_ACTIVATIONS, UNGATED_REFERENCES
from qsparse_moe.sparsity.topk import topk_sparsify

torch.set_num_threads(1)
ALL = ACTIVATIONS | UNGATED_ACTIVATIONS
ALL_REFERENCES = REFERENCES | UNGATED_REFERENCES
B, S, D, F, E = 2, 6, 16, 32, 4


def branches(name, dtype=torch.float64):
    count = 2 if name in ACTIVATIONS else 1
    values = [torch.randn(7, 9, dtype=torch.float64) for _ in range(count)]
    for value in values:
        value[0, :3] = 0.0  # on the kink
    return [value.to(dtype).requires_grad_() for value in values]


@pytest.mark.parametrize("name", ALL)
def test_value_and_every_gradient_match_the_definition(name):
    inputs = branches(name)
    upstream = torch.randn(7, 9, dtype=torch.float64)
    got, want = ALL[name](*inputs), ALL_REFERENCES[name](*inputs)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_within_twice_the_definition_s_own_rounding(name, dtype):
    inputs, upstream = branches(name, dtype), torch.randn(7, 9).to(dtype)

    def run(function, leaves, grad):
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    exact = run(ALL_REFERENCES[name], [x.detach().double().requires_grad_() for x in inputs], upstream.double())
    plain, mine = (run(table[name], inputs, upstream) for table in (ALL_REFERENCES, ALL))
    for got, rounded, want in zip(mine, plain, exact, strict=True):
        assert got.dtype == dtype
        allowed = 2 * (rounded.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("name", ALL)
def test_the_backward_stores_the_inputs_and_nothing_else_and_changes_none(name):
    inputs, saved = branches(name), []
    before = [x.detach().clone() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        out = ALL[name](*inputs)
    out.backward(torch.randn_like(out))
    assert sorted(saved) == sorted(x.data_ptr() for x in inputs)
    assert all(torch.equal(x, was) for x, was in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_nan_passes_forward_and_backward(name):
    inputs = branches(name)
    with torch.no_grad():
        for x in inputs:
            x[3, 4] = float("nan")
    out = ALL[name](*inputs)
    assert out[3, 4].isnan()
    assert out.isnan().sum() == 1
    assert all(grad[3, 4].isnan() for grad in torch.autograd.grad(out, inputs, torch.ones_like(out)))


def make(activation, shared=1, seed=1, selection="auto"):
    moe = MoEConfig(
        num_experts=E, expert_hidden_size=F, activation=activation, backend="loop", num_shared_experts=shared
    )
    config = ModelConfig(hidden_size=D, num_heads=2, moe=moe, sparsity=SparsityConfig(backend=selection))
    layer = MoELayer(config).double()
    initialize(layer, config, seed=seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20)
    return layer


@pytest.mark.parametrize("activation", ALL)
@pytest.mark.parametrize("sparsity", [0.0, 0.25])
def test_natural_zeros_are_counted_together_with_those_of_the_selection(activation, sparsity):
    layer = make(
        activation, selection="torch"
    )  # in one pass a hook could not read what is between activation and selection
    layer.experts.hidden_site.set_sparsity([sparsity] * E)
    seen = []
    layer.experts.hidden_site.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output[0])))
    stats = layer(torch.randn(B, S, D, dtype=torch.float64)).stats
    (before, after), site = seen[0], "sparsity/expert_hidden"
    natural = (before == 0).double().mean()
    low, high = {"swiglu": (0.0, 0.0), "drelu": (0.6, 0.9)}.get(activation, (0.3, 0.7))
    assert low <= natural <= high
    assert stats[f"{site}/nonzero_E"].sum() == torch.count_nonzero(after)
    kept = F - round(F * sparsity)
    assert stats[f"{site}/selected_E"].sum() == len(before) * kept
    assert stats[f"{site}/nonzero_E"].sum() == (before != 0).sum(-1).clamp(max=kept).sum()


def test_experts_without_a_gate_compute_down_of_squared_relu_of_up():
    layer = make("relu2")
    layer.input_site.set_sparsity([0.5] * E)
    layer.experts.hidden_site.set_sparsity([0.75] * E)
    assert not [name for name in layer.state_dict() if "gate" in name]
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    routing = layer.router(x.flatten(0, 1))
    rows = []
    for token, row in enumerate(x.flatten(0, 1)):
        total = (row @ layer.shared.w_up).relu().square() @ layer.shared.w_down
        for weight, expert in zip(routing.weights_TA[token], routing.expert_ids_TA[token].tolist(), strict=True):
            hidden = (topk_sparsify(row, D // 2) @ layer.experts.w_up[expert]).relu().square()
            total = total + weight * (topk_sparsify(hidden, F // 4) @ layer.experts.w_down[expert])
        rows.append(total)
    got, want = layer(x).y_BSD, torch.stack(rows).view_as(x)
    torch.testing.assert_close(got, want)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(x)
    for mine, theirs in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("activation", ALL)
def test_a_model_with_the_activation_trains_every_parameter(activation):
    moe = MoEConfig(num_experts=E, expert_hidden_size=F, activation=activation, num_dense_layers=1)
    config = ModelConfig(vocab_size=40, hidden_size=32, num_layers=2, moe=moe)
    model = build_model(config)
    tokens = torch.randint(0, 40, (4, 12))
    model(tokens, tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert any(name.endswith("dense.w_gate") for name in model.state_dict()) == (activation != "relu2")
