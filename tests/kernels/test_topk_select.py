"""Every implementation of the selection against the definition: values, mask, gradient, edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import native
from qsparse_moe.kernels.topk_select.op import SELECTIONS, select
from qsparse_moe.sparsity.topk import topk_mask_reference, topk_sparsify

IMPLEMENTATIONS = {spec.name: spec.select_rows for spec in SELECTIONS}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 70), st.sampled_from([0, 1, 3]), st.sampled_from(DTYPES), st.integers(0, 2**31)
)
def test_kept_values_and_mask_are_those_of_the_definition(name, num_rows, width, steps, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, width, generator=generator)
    x = ((x * steps).round() / steps if steps else x).to(dtype)
    per_row = torch.randint(1, width + 1, (num_rows,), generator=generator)
    for num_kept in (1, width, (width + 1) // 2, per_row):
        want = topk_mask_reference(x, num_kept)
        kept, mask = IMPLEMENTATIONS[name](x, num_kept, True)
        assert torch.equal(mask, want)
        assert torch.equal(kept, torch.where(want, x, 0))
        assert torch.equal(IMPLEMENTATIONS[name](x, num_kept, False)[0], kept)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nan_and_infinity_are_kept(name):
    x = torch.tensor([[1.0, float("nan"), 5.0, float("-inf"), 0.0]])
    kept, mask = IMPLEMENTATIONS[name](x, 2, True)
    assert mask.tolist() == [[False, True, False, True, False]]
    assert kept.isnan().tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradient", ["ste", "masked"])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("num_kept", [16, torch.tensor([4, 8, 32])])
def test_gradient_is_that_of_topk_sparsify(name, gradient, group_size, num_kept):
    x = torch.randn(3, 32, requires_grad=True)
    upstream = torch.randn(3, 32)
    want = topk_sparsify(x, num_kept, group_size=group_size, gradient=gradient)
    got = select(x, num_kept, rows=IMPLEMENTATIONS[name], group_size=group_size, gradient=gradient)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))


def test_a_view_with_strides_is_selected_like_its_copy():
    x = torch.randn(6, 9).T
    assert torch.equal(IMPLEMENTATIONS["native"](x, 2, False)[0], topk_sparsify(x.contiguous(), 2))


def test_the_native_operator_says_why_it_cannot_run(monkeypatch):
    assert "run on CPUs, the device is cuda" in native.why_not(torch.device("cuda"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda program: None)
    monkeypatch.setattr(native, "_beside_python", lambda program: False)
    assert native.why_not(torch.device("cpu")) == "c++ is not found; install a C++ compiler such as g++"


def test_a_source_that_does_not_compile_is_a_clear_error(monkeypatch, tmp_path):
    (tmp_path / "broken.cpp").write_text("this is not C++;")
    monkeypatch.setattr(native, "_SOURCES", (str(tmp_path / "broken.cpp"),))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(
        BackendUnavailable, match=r"(?s)broken.cpp failed: .*model.sparsity.backend=torch needs no compiler"
    ):
        native.load.__wrapped__()
