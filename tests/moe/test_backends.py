"""Every backend against the loop, over loads and dtypes; and the choice between backends."""

import logging

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import native, onednn
from qsparse_moe.moe.backends import grouped, loop, registry, stacked
from qsparse_moe.moe.backends.registry import BACKENDS
from qsparse_moe.moe.experts import Experts
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


@pytest.mark.parametrize("name", ["native", "onednn", "blas"])
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


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_what_is_frozen_gets_no_gradient_and_no_product(frozen):
    calls = []

    def gemm(a, b, out):
        calls.append((tuple(a.shape), tuple(b.shape)))
        torch.mm(a, b, out=out)

    rows, weights = torch.randn(5, X), torch.randn(2, X, Y)
    (rows if frozen == "weights" else weights).requires_grad_()
    out = stacked.matmul(rows, weights, [2, 3], by=stacked.Products(gemm))
    upstream = torch.randn(5, Y)
    out.backward(upstream)
    products = [((2, X), (X, Y)), ((3, X), (X, Y))]
    if frozen == "weights":
        assert weights.grad is None and calls == [*products, ((2, Y), (Y, X)), ((3, Y), (Y, X))]
        want = torch.cat([grad @ weight.T for grad, weight in zip(upstream.split([2, 3]), weights, strict=True)])
        torch.testing.assert_close(rows.grad, want)
    else:
        assert rows.grad is None and calls == [*products, ((X, 2), (2, Y)), ((X, 3), (3, Y))]
        want = torch.stack(
            [part.T @ grad for part, grad in zip(rows.split([2, 3]), upstream.split([2, 3]), strict=True)]
        )
        torch.testing.assert_close(weights.grad, want)


def test_row_counts_are_rounded_up_as_far_as_the_rows_reach_and_padded_with_zeros_in_the_gradient():
    shapes = []

    def gemm(a, b, out):
        shapes.append((tuple(a.shape), tuple(b.shape)))
        torch.mm(a, b, out=out)

    rows, weights = torch.randn(11, 2, requires_grad=True), torch.randn(4, 2, 3, requires_grad=True)
    out = stacked.matmul(rows, weights, [3, 0, 4, 4], by=stacked.Products(gemm, round_to=4))
    # 3 becomes 4; 4 stays; the last 4 end with the rows. Rounded to 5, the last would reach beyond them.
    assert shapes == [((4, 2), (2, 3)), ((4, 2), (2, 3)), ((4, 2), (2, 3))]
    want = torch.cat([rows[:3] @ weights[0], rows[3:7] @ weights[2], rows[7:] @ weights[3]])
    torch.testing.assert_close(out, want)
    upstream = torch.randn(11, 3)
    for mine, theirs in zip(*(torch.autograd.grad(y, (rows, weights), upstream) for y in (out, want)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert shapes[-3:] == [((2, 4), (4, 3))] * 3
    shapes.clear()
    stacked.matmul(rows, weights, [3, 0, 4, 4], by=stacked.Products(gemm, round_to=5))
    assert [a[0] for a, _ in shapes] == [5, 5, 4]


@pytest.mark.parametrize(("size", "text"), [(5, "8"), (8, "8 and 16"), (23, "16 and 24")])
def test_the_nearest_sizes_of_grouped_products_are_named(size, text):
    assert grouped.near(size) == text


def test_grouped_products_name_the_setting_or_the_version_that_they_lack(monkeypatch):
    sizes = {"hidden_size": 20, "num_heads": 2, "moe": {"expert_hidden_size": 16}}
    model = ModelConfig.model_validate(sizes)
    assert grouped.why_not(model, torch.device("cpu")) == (
        "model.hidden_size (20) must be a multiple of 8; the nearest are 16 and 24"
    )
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert "has no torch.nn.functional.grouped_mm; it is public since torch 2.10" in grouped.why_not(model, "cpu")


@pytest.mark.parametrize(
    ("is_faster", "has_amx", "first", "last"),
    [
        (True, False, ["native", "onednn"], []),
        (True, True, ["onednn"], ["native"]),
        (False, False, [], ["native", "onednn"]),
    ],
)
def test_backends_are_tried_from_the_fastest_on(is_faster, has_amx, first, last, monkeypatch):
    monkeypatch.setattr(registry, "is_faster_in_fp32", lambda: is_faster)
    monkeypatch.setattr(registry, "has_matrix_registers", lambda: has_amx)
    found = [spec.name for spec in registry.fastest_first()]
    assert found == [*first, "blas", "grouped", "megablocks", "loop", *last]


def test_bf16_experts_multiply_rounded_rows_and_leave_the_rows_in_fp32():
    made = ModelConfig(hidden_size=X, num_heads=2, moe=MoEConfig(num_experts=2, expert_hidden_size=8, backend="loop"))
    made = made.model_copy(update={"moe": made.moe.model_copy(update={"activation": "swiglu"})})
    experts = Experts(made, resolve_runtime(made, "cpu")).bfloat16()
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape))
    x, counts = torch.randn(5, X), torch.tensor([2, 3])
    found, _, _ = experts(x, counts, torch.tensor([0, 0, 1, 1, 1]), with_stats=False)
    want = []
    for rows, gate, up, down in zip(x.split([2, 3]), experts.w_gate, experts.w_up, experts.w_down, strict=True):
        inner = torch.nn.functional.silu((rows.bfloat16() @ gate).float()) * (rows.bfloat16() @ up).float()
        want.append((inner.bfloat16() @ down).float())
    assert found.dtype == torch.float32 and torch.equal(found, torch.cat(want))


def config(backend="auto", *, hidden=16, selection_backend="auto"):
    moe = MoEConfig(expert_hidden_size=hidden, backend=backend)
    return ModelConfig(hidden_size=16, num_heads=2, moe=moe, sparsity=SparsityConfig(backend=selection_backend))


@pytest.mark.parametrize(
    ("has_avx512", "has_amx", "name"), [(True, False, "native"), (True, True, "onednn"), (False, False, "blas")]
)
def test_auto_says_what_it_chose_for_the_processor(has_avx512, has_amx, name, caplog, monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx}, raising=False)
    with caplog.at_level(logging.INFO, logger="qsparse_moe.nn.runtime"):
        runtime = resolve_runtime(config(), "cpu")
    assert runtime.names == {"model.moe.backend": name, "model.sparsity.backend": "native"}
    assert f"model.moe.backend=auto: using {name}" in caplog.text


@pytest.mark.parametrize("name", ["native", "onednn", "blas"])
@pytest.mark.parametrize("has_avx512", [True, False])
def test_bf16_products_are_rounded_once_with_and_without_instructions_for_them(name, has_avx512, monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    rows, weights = torch.randn(21, X).bfloat16(), torch.randn(2, X, Y).bfloat16()
    counts = TokenCounts(torch.tensor([13, 8]))
    out = FAST[name](rows, weights, counts)
    exact = loop.matmul(rows.double(), weights.double(), counts)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_auto_takes_the_next_one_if_a_backend_cannot_be_compiled_and_a_name_never_does(caplog, monkeypatch):
    monkeypatch.setattr(onednn, "_HAS_AVX512", True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)

    def fail(library=None):
        if library is native.PRODUCTS:
            raise BackendUnavailable("the compiler fails")

    monkeypatch.setattr(native, "load", fail)
    assert resolve_runtime(config(), "cpu").names["model.moe.backend"] == "onednn"
    assert "model.moe.backend=auto: native cannot be loaded (the compiler fails); trying the next one" in caplog.text
    with pytest.raises(BackendUnavailable, match="the compiler fails"):
        resolve_runtime(config("native"), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", BACKENDS, ids=lambda spec: spec.name)
def test_a_pair_of_products_is_both_of_them_with_one_gradient_of_the_rows(spec, dtype):
    if spec.name in ("grouped", "megablocks") and dtype == torch.float64:
        pytest.skip("grouped_mm has no fp64")
    counts = TokenCounts(torch.tensor([5, 0, 7]))
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((12, X), (3, X, Y), (3, X, Y))]
    upstream = [torch.randn(12, Y, dtype=dtype) for _ in range(2)]
    rows, *stacks = leaves
    want = [loop.matmul(rows, stack, counts) for stack in stacks]
    found = spec.matmul_pair(*leaves, counts)
    torch.testing.assert_close(found, tuple(want))
    grads = [torch.autograd.grad(outputs, leaves, upstream) for outputs in (found, want)]
    torch.testing.assert_close(*grads)


def test_native_needs_even_widths():
    with pytest.raises(BackendUnavailable, match=r"'native'.*expert_hidden_size \(15\) must be even.*in pairs"):
        resolve_runtime(config("native", hidden=15), "cpu")


def test_a_named_backend_runs_or_raises_and_never_falls_back():
    for name in ("loop", "grouped", "native", "onednn", "blas"):
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
