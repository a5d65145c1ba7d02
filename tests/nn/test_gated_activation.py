"""Activation and selection in one pass against one after the other: the same rows, sums and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels import native
from qsparse_moe.kernels.fused_glu.op import FUSED_GLUS
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.runtime import resolve_runtime
from qsparse_moe.nn.activations import ACTIVATIONS
from qsparse_moe.nn.gated_activation import SparseActivation
from qsparse_moe.nn.hooks import SiteHook

E, D, F = 4, 16, 24
PER_EXPERT = [0.25, 0.5, 0.75, 0.0]
CPU = torch.device("cpu")
FUSED = [pytest.param(fused, id=fused.name) for fused in FUSED_GLUS if fused.why_not(CPU) is None]


def config(**changed):
    moe = {"num_experts": E, "expert_hidden_size": F, "num_shared_experts": 1, "backend": "loop"}
    sparsity = {"default": 0.5, "backend": "torch"} | changed.pop("sparsity", {})
    return ModelConfig.model_validate({"hidden_size": D, "num_heads": 2, "moe": moe | changed, "sparsity": sparsity})


def layers(fused, dtype=torch.float32, **changed):
    """Two layers of the same weights, the second with the fused pass."""
    settings = config(**changed)
    made = []
    for by in (None, fused):
        layer = MoELayer(settings).to(dtype)
        initialize(layer, settings, seed=1)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(20)
        layer.experts.hidden_site.set_sparsity(PER_EXPERT)
        layer.shared.hidden_site.set_sparsity([0.5])
        for part in (layer.experts, layer.shared):
            part.activation = SparseActivation(settings.moe.activation, part.hidden_site, by)
        made.append(layer)
    return made


@pytest.fixture
def calls(monkeypatch):
    """Count how often the fused pass runs."""
    seen = []
    from qsparse_moe.nn import gated_activation as hidden

    fused_glu = hidden.fused_glu

    def counted(*args, **kwargs):
        seen.append(kwargs)
        return fused_glu(*args, **kwargs)

    monkeypatch.setattr(hidden, "fused_glu", counted)
    return seen


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(
    ("activation", "rescale", "gradient"),
    list(itertools.product(["relu2glu", "swiglu"], ["none", "unit"], ["ste", "masked"])),
)
def test_one_pass_gives_the_values_sums_and_gradients_of_two(fused, activation, rescale, gradient, calls):
    changed = {"activation": activation, "sparsity": {"rescale": rescale, "gradient": gradient}}
    x = torch.randn(2, 7, D)
    upstream, results = torch.randn(2, 7, D), []
    for layer in layers(fused, **changed):
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        grads = torch.autograd.grad(output.y_BSD, [leaf, *layer.parameters()], upstream, allow_unused=True)
        results.append((output.y_BSD, grads, output.stats))
    assert len(calls) == 2  # experts and shared experts, of the second layer
    (want, want_grads, want_stats), (got, got_grads, got_stats) = results
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want_stats.keys() == got_stats.keys()
    for name, value in want_stats.items():
        torch.testing.assert_close(got_stats[name], value, rtol=1e-5, atol=0.0, msg=name)
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu2glu", "swiglu"])
@pytest.mark.parametrize("shape", [(7, F), (2, 3, F), (0, F)])
def test_a_dense_site_takes_the_activations_backward_in_one_pass(fused, activation, dtype, shape):
    _, layer = layers(fused, activation=activation)
    layer.experts.hidden_site.set_sparsity([0.0] * E)
    gate, up = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(shape).to(dtype)
    got = layer.experts.activation(gate, up, with_stats=False)[0]
    assert (got.grad_fn.name() == "_BackwardInOnePassBackward") == (dtype != torch.float64)
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    want = ACTIVATIONS[activation](*wide)
    pairs = zip(
        (got, *torch.autograd.grad(got, (gate, up), upstream)),
        (want, *torch.autograd.grad(want, wide, upstream.double())),
        strict=True,
    )
    for mine, theirs in pairs:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), theirs, rtol=4 * eps, atol=8 * eps)


def test_leading_dimensions_are_computed_as_if_flattened():
    _, layer = layers(FUSED_GLUS[0])
    gate, up = torch.randn(2, 3, 5, F)
    selected, _ = layer.shared.activation(gate, up, with_stats=True)
    want, _ = layer.shared.activation(gate.flatten(0, 1), up.flatten(0, 1), with_stats=True)
    assert torch.equal(selected.flatten(0, 1), want)


@pytest.mark.parametrize(
    "changed",
    [
        {"sparsity": {"selection": "statistical"}},
        {"sparsity": {"selection": "block", "group_size": 8}},
        {"sparsity": {"rescale": "preserve"}},
        {"sparsity": {"gradient": "blend", "blend": {"start": 0.5, "end": 0.5}}},
        {"sparsity": {"quantization": {"activations": "int8"}}},
        {"sparsity": {"debug": True}},
        {"activation": "reglu"},
        {"activation": "relu2"},
    ],
    ids=str,
)
def test_unsupported_settings_use_two_passes(changed, calls):
    _, layer = layers(FUSED_GLUS[0], **changed)
    layer(torch.randn(1, 3, D))
    assert not calls


def test_a_site_with_a_hook_or_without_selection_uses_two_passes(calls):
    _, layer = layers(FUSED_GLUS[0])
    layer.shared.hidden_site.set_sparsity([0.0])
    layer.experts.hidden_site.hook = SiteHook(lambda rows, experts, sparse: sparse)
    layer(torch.randn(1, 3, D))
    assert not calls


def test_the_fused_pass_is_that_of_the_implementation_of_the_selection():
    assert resolve_runtime(config(), "cpu").sites.fused_glu is None
    if native.why_not(CPU) is None:
        assert resolve_runtime(config(sparsity={"backend": "native"}), "cpu").sites.fused_glu.name == "native"
