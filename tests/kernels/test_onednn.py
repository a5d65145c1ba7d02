"""Matrix products through oneDNN against torch's own, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from qsparse_moe.kernels.onednn import gemm, linear, why_not


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
def test_gemm_writes_the_product_of_views_with_any_strides(dtype, transpose):
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    exact = a.double() @ b.double()
    a, b = a.to(dtype), b.to(dtype)
    if transpose:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    out = torch.full((6, 3), float("nan"), dtype=dtype)
    gemm(a, b, out[:5])
    assert (out[:5].double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()
    assert out[5].isnan().all()


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_linear_and_both_gradients_agree_with_torch(shape):
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 6)
    if len(shape) == 1:
        x, upstream = torch.randn(1, 4, requires_grad=True), torch.randn(1, 6)
    got, want = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(*(torch.autograd.grad(o, (x, weight), upstream) for o in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_other_devices_are_refused_with_the_reason():
    assert why_not(torch.device("cpu")) is None
    assert why_not(torch.device("cuda")) == "oneDNN runs on CPUs, the device is cuda"
