"""Matrix products through oneDNN compared with torch's, forward and every gradient."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from qsparse_moe.kernels import onednn
from qsparse_moe.kernels.onednn import gemm, linear, needs_fp32, torch_gemm, why_not


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("multiply", [gemm, torch_gemm])
def test_gemm_writes_the_product_of_views_with_any_strides(multiply, dtype, transpose):
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    exact = a.double() @ b.double()
    a, b = a.to(dtype), b.to(dtype)
    if transpose:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    out = torch.full((6, 3), float("nan"), dtype=dtype)
    multiply(a, b, out[:5])
    assert (out[:5].double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()
    assert out[5].isnan().all()
    transposed = torch.full((3, 6), float("nan"), dtype=dtype).T
    multiply(a, b, transposed[:5])
    assert (transposed[:5].double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()
    assert transposed[5].isnan().all()


@pytest.mark.parametrize("has_avx512", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 4)])
def test_linear_and_both_gradients_agree_with_torch(shape, transposed, has_avx512, monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    x, stored = torch.randn(*shape, requires_grad=True), torch.randn(6, 4)
    stored = (stored.T.contiguous() if transposed else stored).requires_grad_()
    weight = stored.T if transposed else stored
    upstream = torch.randn(*shape[:-1], 6)
    got, want = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(*(torch.autograd.grad(o, (x, stored), upstream) for o in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_linear_gives_a_weight_or_an_input_that_is_not_trained_no_gradient_and_the_other_its_own(wanted, monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", True)
    leaves = {"x": torch.randn(3, 4), "weight": torch.randn(6, 4)}
    upstream = torch.randn(3, 6)
    leaves[wanted].requires_grad_()
    want = {"x": upstream @ leaves["weight"], "weight": upstream.T @ leaves["x"]}[wanted]
    linear(**dict(zip(("x", "weight_NK"), leaves.values(), strict=True))).backward(upstream)
    torch.testing.assert_close(leaves[wanted].grad, want.detach())
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_linear_in_bf16_without_instructions_for_it_is_rounded_once(monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", False)
    x, weight = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((3, 64), (5, 64)))
    y = linear(x, weight)
    upstream = torch.randn(3, 5).bfloat16()
    grads = torch.autograd.grad(y, (x, weight), upstream)
    exact = (x.double() @ weight.double().T, upstream.double() @ weight.double(), upstream.double().T @ x.double())
    for got, want in zip((y, *grads), exact, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


def test_other_devices_are_refused_with_the_reason():
    assert why_not(torch.device("cpu")) is None
    assert why_not(torch.device("cuda")) == "oneDNN runs on CPUs, the device is cuda"


@pytest.mark.parametrize(
    ("dtype", "device", "has_avx512", "needed"),
    [
        (torch.bfloat16, "cpu", False, True),
        (torch.bfloat16, "cpu", True, False),
        (torch.bfloat16, "cuda", False, False),
        (torch.float16, "cpu", False, False),
        (torch.float32, "cpu", False, False),
    ],
)
def test_only_bf16_on_a_cpu_without_instructions_for_it_is_computed_in_fp32(
    dtype, device, has_avx512, needed, monkeypatch
):
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    assert needs_fp32(dtype, torch.device(device)) is needed


GROWTH = """
import resource, torch
from qsparse_moe.training.distributed.ranks import open_distributed
with open_distributed("cpu"):
    weight, rows = torch.ones(16, 16), torch.ones(600, 16)
    for count in range(1, 601):
        torch.ops.mkldnn._linear_pointwise(rows[:count], weight, None, "none", [], "")
        if count == 350:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(onednn.why_not(torch.device("cpu")) is not None, reason="torch was built without oneDNN")
def test_the_memory_of_a_run_stops_growing_with_the_sizes_of_its_products():
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    found = subprocess.run(
        [sys.executable, "-c", GROWTH], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    # 0.5 MB for each of the 250 sizes without a limit.
    assert int(found.stdout.split()[-1]) < 40


def test_a_limit_of_the_environment_takes_precedence(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    # Set first, so that what the call sets is removed after the test.
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "")
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    onednn.limit_compiled_products()
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("7", "256")
