"""int8 rows in Triton beyond the registry's cases: halves, broken rows, gradient."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels import tiles
from qsparse_moe.kernels.int8_quantize import example_inputs
from qsparse_moe.sparsity.quantize import fake_quantize, quantize

if tiles.why_not(torch.device("cpu")):
    pytest.skip(tiles.why_not(torch.device("cpu")), allow_module_level=True)

from qsparse_moe.kernels.int8_quantize.triton import fake_quantize_triton, quantize_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["ties", "plain", "zeros"])
def test_codes_and_scales_are_those_of_the_reference_halves_included(case, dtype):
    x = example_inputs(case, dtype, "cpu").tensors["x"]
    if case == "ties":
        assert (x[:, 1:].float() % 1 == 0.5).any()
    codes, scale = quantize_triton(x)
    want = quantize(x, "int8")
    assert codes.dtype == torch.int8
    assert torch.equal(codes.float(), want.codes)
    assert torch.equal(scale, want.scale)
    # Triton's interpreter cuts fp32 off to bf16, where a GPU rounds it.
    off = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(fake_quantize_triton(x), fake_quantize(x, "int8"), rtol=off, atol=0.0)


def test_leading_dims_are_rows_and_the_gradient_passes_through():
    x = torch.randn(2, 3, 10, requires_grad=True)
    upstream = torch.randn(2, 3, 10)
    out = fake_quantize_triton(x)
    assert torch.equal(out, fake_quantize(x, "int8"))
    assert torch.equal(torch.autograd.grad(out, x, upstream)[0], upstream)
    assert quantize_triton(x).scale.shape == (2, 3, 1)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_has_no_finite_value_left_and_its_neighbour_all(broken):
    x = torch.randn(2, 10)
    x[1, 4] = broken
    finite = fake_quantize_triton(x).isfinite()
    assert finite[0].all() and not finite[1].any()
    assert quantize_triton(x).scale.isfinite().flatten().tolist() == [True, False]
