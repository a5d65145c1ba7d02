"""Every backend against the loop, over loads and dtypes; and the choice between backends."""

import logging

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import onednn
from qsparse_moe.moe.backends import loop
from qsparse_moe.moe.backends.registry import BACKENDS
from qsparse_moe.moe.permutation import TokenCounts
from qsparse_moe.moe.runtime import resolve_runtime

FAST = {spec.name: spec.matmul for spec in BACKENDS if spec.name != "loop"}
LOADS = {
    "even": [8, 8, 8],
    "skewed": [1, 30, 2],
    "an expert without rows": [5, 0, 7],
    "first and last without rows": [0, 9, 0],
    "all on one": [0, 0, 17],
    "no rows at all": [0, 0, 0],
    "longer than a rounded block": [33, 47, 16],
}
X, Y = 16, 24


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_matches_the_loop_in_output_and_every_gradient(name, load, dtype):
    counts = TokenCounts(torch.tensor(load))
    inputs = [torch.randn(sum(load), X), torch.randn(len(load), X, Y)]
    upstream = torch.randn(sum(load), Y)

    def run(matmul, dtype):
        leaves = [part.to(dtype).requires_grad_() for part in inputs]
        out = matmul(*leaves, counts)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    exact, plain, fast = run(loop.matmul, torch.float64), run(loop.matmul, dtype), run(FAST[name], dtype)
    for part, want, reference, got in zip(("y", "grad_rows", "grad_weights"), exact, plain, fast, strict=True):
        assert got.shape == want.shape, part
        if want.numel() == 0:
            continue
        rounding = (reference.double() - want).abs().max()
        error = (got.double() - want).abs().max()
        allowed = 2 * rounding + torch.finfo(dtype).eps * want.abs().max()
        assert error <= allowed, f"{name} {part}: error {error:.2e} > allowed {allowed:.2e}"


@pytest.mark.parametrize("name", ["onednn", "blas"])
def test_a_transposed_weight_gets_the_same_gradient_in_its_own_layout(name):
    # Layers of transformers store (E, Y, X). A gradient in another layout would be copied by autograd in every step.
    matmul, counts = {spec.name: spec.matmul for spec in BACKENDS}[name], TokenCounts(torch.tensor([5, 0, 7]))
    rows, weights, upstream = torch.randn(12, X), torch.randn(3, X, Y), torch.randn(12, Y)
    found = []
    for stored in (weights.clone().requires_grad_(), weights.mT.contiguous().requires_grad_()):
        used = stored if stored.shape == weights.shape else stored.mT
        out = matmul(rows, used, counts)
        found.append((out.detach(), torch.autograd.grad(out, stored, upstream)[0]))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1].mT, found[0][1])
    assert found[1][1].is_contiguous()


def config(backend="auto", *, hidden=16, selection_backend="auto"):
    moe = MoEConfig(expert_hidden_size=hidden, backend=backend)
    return ModelConfig(hidden_size=16, num_heads=2, moe=moe, sparsity=SparsityConfig(backend=selection_backend))


@pytest.mark.parametrize(("has_avx512", "name"), [(True, "onednn"), (False, "blas")])
def test_auto_says_what_it_chose_for_the_processor(has_avx512, name, caplog, monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    with caplog.at_level(logging.INFO, logger="qsparse_moe.nn.runtime"):
        runtime = resolve_runtime(config(), "cpu")
    assert runtime.names == {"model.moe.backend": name, "model.sparsity.backend": "native"}
    assert f"model.moe.backend=auto: using {name}" in caplog.text


@pytest.mark.parametrize("name", ["onednn", "blas"])
@pytest.mark.parametrize("has_avx512", [True, False])
def test_bf16_products_are_rounded_once_with_and_without_instructions_for_them(name, has_avx512, monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    rows, weights = torch.randn(21, X).bfloat16(), torch.randn(2, X, Y).bfloat16()
    counts = TokenCounts(torch.tensor([13, 8]))
    out = FAST[name](rows, weights, counts)
    exact = loop.matmul(rows.double(), weights.double(), counts)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_a_named_backend_runs_or_raises_and_never_falls_back():
    for name in ("loop", "grouped", "onednn", "blas"):
        assert resolve_runtime(config(name), "cpu").names["model.moe.backend"] == name
    with pytest.raises(
        BackendUnavailable, match=r"'grouped'.*expert_hidden_size \(12\) must be a multiple of 8.*8 and 16"
    ):
        resolve_runtime(config("grouped", hidden=12), "cpu")
    with pytest.raises(BackendUnavailable, match=r"model.moe.backend \('onednn'\).*the device is cuda"):
        resolve_runtime(config("onednn"), "cuda")
    with pytest.raises(BackendUnavailable, match=r"model.moe.backend \('blas'\).*CPUs.*the device is cuda"):
        resolve_runtime(config("blas"), "cuda")
    with pytest.raises(BackendUnavailable, match=r"model.sparsity.backend \('native'\).*the device is cuda"):
        resolve_runtime(config("loop", selection_backend="native"), "cuda")


def test_triton_by_name_runs_or_says_why_it_cannot(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    runtime = resolve_runtime(config("loop", selection_backend="triton"), "cpu")
    assert runtime.names["model.sparsity.backend"] == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match=r"model.sparsity.backend \('triton'\).*run on CUDA devices"):
        resolve_runtime(config("loop", selection_backend="triton"), "cpu")
