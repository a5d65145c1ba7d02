"""int8 rows in Triton beyond the registry's cases: halves, broken rows, gradient."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.kernels import tiles
from qsparse_moe.kernels.int8_quantize import example_inputs
from qsparse_moe.model.transformer import build_model
from qsparse_moe.sparsity.quantize import fake_quantize, quantize

if tiles.why_not(torch.device("cpu")):
    pytest.skip(tiles.why_not(torch.device("cpu")), allow_module_level=True)

from qsparse_moe.kernels.int8_quantize import triton as triton_module
from qsparse_moe.kernels.int8_quantize.triton import fake_quantize_triton


def halves(num_rows: int, num_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows whose values, except the first and largest, are as near to the middle of two codes as possible."""
    generator = torch.Generator().manual_seed(num_features)
    largest = torch.rand(num_rows, 1, generator=generator) * 3 + 0.1
    x = (torch.randint(-127, 127, (num_rows, num_features), generator=generator) + 0.5) * largest / 127
    x[:, :1] = largest
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_features", [48, 1100, 2100])
def test_halves_are_rounded_as_by_the_reference(num_features, dtype):
    """The two quotients 127 / g and 127 * (1 / g) put a tenth of such values on different sides."""
    x = halves(64, num_features, dtype)
    assert torch.equal(fake_quantize_triton(x), fake_quantize(x, "int8"))
    if dtype == torch.float32:
        codes = quantize(x, "int8").codes[:, 1:]
        largest = x[:, :1]
        other = (torch.full_like(largest, 127.0).div(largest) * x[:, 1:]).round()
        assert (codes != other).float().mean() > 0.02, "the rule must matter for these values"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["ties", "plain", "zeros", "many_features"])
def test_values_are_those_of_the_reference_bit_for_bit(case, dtype):
    x = example_inputs(case, dtype, "cpu").tensors["x"]
    if case == "ties":
        assert (x[:, 1:].float() % 1 == 0.5).any()
    assert torch.equal(fake_quantize_triton(x), fake_quantize(x, "int8"))


def test_leading_dims_are_rows_and_the_gradient_passes_through():
    x = torch.randn(2, 3, 10, requires_grad=True)
    upstream = torch.randn(2, 3, 10)
    out = fake_quantize_triton(x)
    assert torch.equal(out, fake_quantize(x, "int8"))
    assert torch.equal(torch.autograd.grad(out, x, upstream)[0], upstream)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_nan_or_infinity_becomes_non_finite_and_its_neighbour_stays_finite(broken):
    x = torch.randn(2, 10)
    x[1, 4] = broken
    finite = fake_quantize_triton(x).isfinite()
    assert finite[0].all() and not finite[1].any()


def test_a_model_whose_sites_run_on_triton_rounds_its_activations_there_and_computes_the_same(monkeypatch):
    quantization = {"activations": "int8", "sites": {"attention_output": "int4"}}
    moe = MoEConfig(num_experts=2, experts_per_token=1, expert_hidden_size=24, router="softmax_topk", backend="loop")

    def run(backend):
        sparsity = SparsityConfig.model_validate({"quantization": quantization, "default": 0.5, "backend": backend})
        config = ModelConfig(vocab_size=24, hidden_size=16, num_layers=1, num_heads=2, moe=moe, sparsity=sparsity)
        model = build_model(config, seed=1)
        tokens = torch.arange(20).view(2, 10)
        out = model(tokens, tokens)
        out.loss.backward()
        return out.logits_BSV, [parameter.grad for parameter in model.parameters()]

    widths = []
    kernel = triton_module._rounded
    monkeypatch.setattr(triton_module, "_rounded", lambda x: widths.append(x.shape[-1]) or kernel(x))
    (logits, grads), rounded = run("triton"), sorted(widths)
    widths.clear()
    want, want_grads = run("torch")
    assert set(rounded) == {16, 24} and widths == []
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(grads, want_grads)
