"""Every implementation of the selection against the definition: values, mask, gradient, edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_moe.kernels import native, tiles
from qsparse_moe.kernels.topk_select.op import TOPK_SELECTS, select, select_mask
from qsparse_moe.sparsity.topk import topk_mask, topk_mask_reference, topk_sparsify

IMPLEMENTATIONS = {spec.name: spec.select_rows for spec in TOPK_SELECTS}

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def runnable(name):
    """The implementation, where it runs on this machine's CPU."""
    reason = next(spec for spec in TOPK_SELECTS if spec.name == name).why_not(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    return IMPLEMENTATIONS[name]


ROWS_AND_K = (
    st.integers(0, 9),
    st.integers(1, 70),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)


@pytest.mark.parametrize("name", ["native", "torch"])
@settings(max_examples=120, deadline=None)
@given(*ROWS_AND_K)
def test_selected_values_and_mask_are_those_of_the_definition(name, num_rows, width, steps, dtype, seed):
    check_definition(IMPLEMENTATIONS[name], num_rows, width, steps, dtype, seed)


@settings(max_examples=8, deadline=None)  # Triton's interpreter takes its time
@given(*ROWS_AND_K)
def test_selected_values_and_mask_of_triton_are_those_of_the_definition(num_rows, width, steps, dtype, seed):
    check_definition(runnable("triton"), num_rows, width, steps, dtype, seed)


def check_definition(select_rows, num_rows, width, steps, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, width, generator=generator)
    x = ((x * steps).round() / steps if steps else x).to(dtype)
    per_row = torch.randint(1, width + 1, (num_rows,), generator=generator)
    for num_selected in (1, width, (width + 1) // 2, per_row):
        want = topk_mask_reference(x, num_selected)
        selected, mask = select_rows(x, num_selected, True)
        assert torch.equal(mask, want)
        assert torch.equal(selected, torch.where(want, x, 0))
        assert torch.equal(select_rows(x, num_selected, False)[0], selected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nan_and_infinity_are_selected(name):
    x = torch.tensor([[1.0, float("nan"), 5.0, float("-inf"), 0.0]])
    selected, mask = runnable(name)(x, 2, True)
    assert mask.tolist() == [[False, True, False, True, False]]
    assert selected.isnan().tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradient", ["ste", "masked"])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("num_selected", [16, torch.tensor([4, 8, 32])])
def test_gradient_is_that_of_topk_sparsify(name, gradient, group_size, num_selected):
    x = torch.randn(3, 32, requires_grad=True)
    upstream = torch.randn(3, 32)
    want = topk_sparsify(x, num_selected, group_size=group_size, gradient=gradient)
    got = select(x, num_selected, rows=runnable(name), group_size=group_size, gradient=gradient)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
    with torch.no_grad():
        without = select(x, num_selected, rows=runnable(name), group_size=group_size, gradient=gradient)
    assert torch.equal(without, want) and not without.requires_grad


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("num_selected", [16, torch.tensor([4, 8, 32])])
def test_the_mask_alone_is_that_of_topk_mask(name, group_size, num_selected):
    x = torch.randn(3, 32)
    found = select_mask(x, num_selected, rows=runnable(name), group_size=group_size)
    assert torch.equal(found, topk_mask(x, num_selected, group_size=group_size))


def test_the_native_operator_says_why_it_cannot_run(monkeypatch):
    assert "run on CPUs, the device is cuda" in native.why_not(torch.device("cuda"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda program: None)
    monkeypatch.setattr(native, "_beside_python", lambda program: False)
    assert native.why_not(torch.device("cpu")) == "c++ is not found; install a C++ compiler such as g++"


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert tiles.why_not(torch.device("cuda")) is None
    reason = "the Triton kernels run on CUDA devices, the device is cpu; TRITON_INTERPRET=1 runs them slowly"
    assert tiles.why_not(torch.device("cpu")) == reason
    monkeypatch.setattr(tiles.importlib.util, "find_spec", lambda name: None)
    assert tiles.why_not(torch.device("cuda")) == 'triton is not installed; pip install "qsparse-moe[gpu]"'


def test_rows_longer_than_a_tile_can_be_are_refused():
    assert tiles.row_tile(3, tiles.MAX_FEATURES) == (1, 65536, 32)
    with pytest.raises(ValueError, match="hold at most 65536 features, got 65537"):
        tiles.row_tile(3, tiles.MAX_FEATURES + 1)


@pytest.mark.parametrize(
    ("num_rows", "num_features", "tile"),
    [
        (1, 1, (1, 1, 4)),
        (5, 37, (8, 64, 4)),
        (9999, 32, (64, 32, 4)),
        (9999, 1024, (2, 1024, 4)),
        (9, 5000, (1, 8192, 16)),
    ],
)
def test_tiles_hold_whole_rows_and_few_rows_make_small_tiles(num_rows, num_features, tile):
    assert tiles.row_tile(num_rows, num_features) == tile
    assert tiles.flat_tile(9999, 5000) == (1, 2048, 4)


def test_a_k_expanded_over_groups_is_read_from_its_own_entry():
    from qsparse_moe.kernels.topk_select.triton import k_arguments

    wanted = torch.tensor([3, 4])
    per_row, one, rows_per_k = k_arguments(wanted[:, None].expand(2, 5))
    assert (per_row.tolist(), one, rows_per_k) == ([3, 4], 0, 5)
    assert k_arguments(6) == (None, 6, 1)
    per_row, _, rows_per_k = k_arguments(wanted)
    assert (per_row.tolist(), rows_per_k) == ([3, 4], 1)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_row_of_every_leading_dimension_has_its_own_k(name):
    x, num_selected = torch.randn(3, 4, 10), torch.arange(2, 14).clamp(max=10).view(3, 4)
    selected, mask = runnable(name)(x, num_selected, True)
    assert torch.equal(mask, topk_mask_reference(x, num_selected))
    assert torch.equal(selected, x * mask)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("group_size", [None, 5])
def test_rows_and_k_may_have_strides(name, group_size):
    x = torch.randn(10, 7, 4).transpose(0, 2)
    num_selected = (2 * torch.arange(1, 57).remainder(5) + 2).view(7, 8).T[::2]
    assert x.shape == (4, 7, 10) and num_selected.shape == (4, 7) and not num_selected.is_contiguous()
    want = topk_mask(x, num_selected, group_size=group_size)
    assert torch.equal(select_mask(x, num_selected, rows=runnable(name), group_size=group_size), want)
    assert torch.equal(select(x, num_selected, rows=runnable(name), group_size=group_size), x * want)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_rows_with_many_zeros_select_non_zero_values_first(name, more):
    x = torch.randn(8, 40).relu()
    num_selected = ((x > 0).sum(-1) + more).clamp(1, 40)
    selected, mask = runnable(name)(x, num_selected, True)
    assert torch.equal(mask, topk_mask_reference(x, num_selected))
    assert torch.equal(selected, x * mask)
    assert torch.equal(runnable(name)(x, num_selected, False)[0], selected)


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 16, 31, 32, 64, 65, 4099])
def test_rows_of_every_length_with_their_own_k_on_two_threads(width, dtype, threads):
    """Ties, and more rows than one thread's chunk holds; lengths of 16, 32 and 64 have loops of their own."""
    generator = torch.Generator().manual_seed(width)
    num_rows = 2 * (1 + 16384 // width) + 3
    x = ((4 * torch.randn(num_rows, width, generator=generator)).round() / 4).to(dtype)
    num_selected = torch.randint(1, width + 1, (num_rows,), generator=generator)
    for wanted in (num_selected, max(1, width // 3)):
        want = topk_mask_reference(x, wanted)
        selected, mask = runnable("native")(x, wanted, True)
        assert torch.equal(mask, want)
        assert torch.equal(selected, torch.where(want, x, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_selected", [1, 40000, 65535])
def test_the_longest_row_is_counted_without_overflow_and_a_longer_one_is_refused(dtype, num_selected):
    x = torch.randn(2, 65535, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 1
    selected, mask = runnable("native")(x, num_selected, True)
    assert torch.equal(mask, topk_mask_reference(x, num_selected))
    assert torch.equal(selected, x * mask)
    with pytest.raises(RuntimeError, match="rows must be shorter than 65536, got 65536"):
        runnable("native")(torch.ones(1, 65536, dtype=dtype), 1, True)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("group_size", "gradient"), [(None, "masked"), (8, "ste"), (8, "masked")])
def test_k_per_row_in_several_tiles_of_rows(name, group_size, gradient):
    generator = torch.Generator().manual_seed(5)
    x = ((2 * torch.randn(70, 40, generator=generator)).round() / 2).requires_grad_()
    upstream = torch.randn(70, 40, generator=generator)
    num_selected = 5 * torch.randint(1, 9, (70,), generator=generator)
    want = topk_sparsify(x, num_selected, group_size=group_size, gradient=gradient)
    got = select(x, num_selected, rows=runnable(name), group_size=group_size, gradient=gradient)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
