"""The fused activation, selection and sums beyond the registry's cases: NaN, joint matrices, sums left out."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels.fused_glu import reference
from qsparse_moe.kernels.fused_glu.op import FUSED_GLUS, fused_glu
from qsparse_moe.nn.activations import REFERENCES
from qsparse_moe.sparsity.stats import Readers, row_pattern, row_sums, site_stats
from qsparse_moe.sparsity.topk import topk_sparsify

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[pytest.param(by, id=by.name) for by in FUSED_GLUS])
def by(request):
    reason = request.param.why_not(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    return request.param


def test_every_activation_has_one_reference():
    assert reference.ACTIVATIONS.items() <= REFERENCES.items()


@pytest.mark.parametrize("num_selected", [5, torch.tensor([1, 9, 4, 7])])
def test_sums_of_the_reference_are_those_of_a_site(num_selected):
    gate, up = torch.randn(2, 4, 9)
    selected, sums = reference.fused_glu(gate, up, num_selected)
    all_rows = Readers()
    of_the_site = row_sums(reference.relu2glu(gate, up), selected)
    want = site_stats(of_the_site, row_pattern(selected, all_rows), num_selected, all_rows)
    for name, of_rows in sums._asdict().items():
        total = want[f"{name.removesuffix('_N')}_E"].squeeze()
        torch.testing.assert_close(of_rows.double().sum(), total, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_selection_is_exact_for_the_activation_as_it_is_stored(by, activation, dtype):
    # Values so close together that a selection in fp32 would choose others.
    gate, up = (1 + 0.05 * torch.randn(2, 6, 64)).to(dtype)
    dense = fused_glu(gate, up, 64, by=by, activation=activation)[0]
    for num_selected in (1, 20, torch.tensor([3, 64, 1, 63, 32, 9])):
        selected, sums = fused_glu(gate, up, num_selected, by=by, activation=activation)
        assert torch.equal(selected, topk_sparsify(dense, num_selected))
        torch.testing.assert_close(sums, reference.selection_sums(dense, selected, num_selected))


def test_halves_of_one_matrix_are_read_in_place(by):
    joint = torch.randn(5, 2 * 12, requires_grad=True)
    upstream = torch.randn(5, 12)
    results = []
    for run in (reference.fused_glu, lambda *args: fused_glu(*args, by=by)):
        selected, _ = run(*joint.chunk(2, dim=-1), 4)
        results.append((selected, torch.autograd.grad(selected, joint, upstream)[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("gradient", ["ste", "masked"])
def test_every_matrix_is_read_by_its_own_stride(by, gradient):
    wide = torch.randn(5, 60)
    gate, up, upstream = wide[:, :13], wide[:, 20:59:3].contiguous()[:, :13], torch.randn(5, 17)[:, 2:15]
    strides = [x.stride() for x in (gate, up, upstream)]
    assert strides == [(60, 1), (13, 1), (17, 1)]
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    selected, _ = fused_glu(gate, up, 4, by=by, gradient=gradient)
    want, _ = reference.fused_glu(gate, up, 4, gradient=gradient)
    torch.testing.assert_close(selected, want)
    mine, theirs = (torch.autograd.grad(out, leaves, upstream) for out in (selected, want))
    torch.testing.assert_close(mine, theirs)


def test_features_and_k_may_have_strides(by):
    draw = torch.Generator().manual_seed(6)
    gate, up, upstream = torch.randn(3, 13, 5, generator=draw).mT
    num_selected = torch.tensor([[1, 12], [13, 2], [4, 3], [7, 9], [2, 6]], dtype=torch.int32)[:, 0]
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    found, sums = fused_glu(*leaves, num_selected, by=by, gradient="masked")
    want, wanted = reference.fused_glu(*leaves, num_selected, gradient="masked")
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(sums, wanted)
    mine, theirs = (torch.autograd.grad(out, leaves, upstream) for out in (found, want))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_a_masked_gradient_reaches_k_features_also_where_more_are_zero(by, activation):
    gate, up = torch.rand(5, 9) + 0.5, torch.rand(5, 9) + 0.5
    up[:, [0, 1, 3, 4, 6, 8]] = 0.0
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    settings = {"activation": activation, "gradient": "masked"}
    found, _ = fused_glu(*leaves, 5, by=by, **settings)
    want, _ = reference.fused_glu(*leaves, 5, **settings)
    mine, theirs = (torch.autograd.grad(out, leaves, torch.ones(5, 9)) for out in (found, want))
    # Features 2, 5 and 7, and of the zeros those with the lowest indices.
    assert (mine[1] != 0).nonzero()[:, 1].tolist() == [0, 1, 2, 5, 7] * 5
    torch.testing.assert_close(mine, theirs)


def test_an_expanded_gradient_is_accepted(by):
    gate, up = torch.randn(2, 5, 12, requires_grad=True)
    selected, _ = fused_glu(gate, up, 4, by=by)
    want, _ = reference.fused_glu(gate, up, 4)
    for mine, theirs in zip(*(torch.autograd.grad(out.sum(), (gate, up)) for out in (selected, want)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("broken", ["gate", "up"])
def test_a_nan_is_selected_and_propagates_to_its_gradients(by, activation, broken):
    inputs = {"gate": torch.rand(2, 8), "up": torch.rand(2, 8)}
    inputs[broken][1, 5] = float("nan")
    leaves = [x.requires_grad_() for x in inputs.values()]
    selected, sums = fused_glu(*leaves, 2, by=by, activation=activation)
    assert selected.isnan().nonzero().tolist() == [[1, 5]]
    assert sums.energy_N.isnan().tolist() == [False, True]
    want = torch.autograd.grad(reference.fused_glu(*leaves, 2, activation=activation)[0], leaves, torch.ones(2, 8))
    for mine, theirs in zip(torch.autograd.grad(selected, leaves, torch.ones(2, 8)), want, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_large_and_infinite_gates_give_what_torch_gives(by, activation):
    gate = torch.tensor([[200.0, -200.0, 89.0, -89.0, 1e4, -1e4, 0.0, float("inf")]], requires_grad=True)
    up = torch.tensor([[1.0, 2.0, -1.0, 3.0, 1.0, -1.0, 5.0, 1.0]], requires_grad=True)
    selected, _ = fused_glu(gate, up, 8, by=by, activation=activation)
    want, _ = reference.fused_glu(gate, up, 8, activation=activation)
    torch.testing.assert_close(selected, want, atol=1e-30, rtol=1e-5)
    finite = torch.tensor([[1.0] * 7 + [0.0]])
    for mine, theirs in zip(*(torch.autograd.grad(o, (gate, up), finite) for o in (selected, want)), strict=True):
        torch.testing.assert_close(mine[:, :7], theirs[:, :7], atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize("with_sums", [True, False])
def test_without_gradients_every_bit_is_the_same(by, with_sums):
    gate, up = torch.randn(2, 5, 24).requires_grad_()
    want = fused_glu(gate, up, 7, by=by, activation="swiglu", with_sums=with_sums)
    with torch.no_grad():
        found = fused_glu(gate, up, 7, by=by, activation="swiglu", with_sums=with_sums)
    assert want[0].requires_grad and not found[0].requires_grad
    assert torch.equal(found[0], want[0]) and (found[1] is None) == (not with_sums)
    if with_sums:
        assert all(map(torch.equal, found[1], want[1]))


def test_sums_are_left_out_unless_requested(by):
    gate, up = torch.randn(2, 5, 12)
    selected, sums = fused_glu(gate, up, 4, by=by, with_sums=False)
    assert sums is None
    torch.testing.assert_close(selected, reference.fused_glu(gate, up, 4)[0])


@pytest.mark.parametrize("gradient", ["ste", "masked"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(("num_rows", "width"), [(70, 41), (3, 2100)])
def test_k_per_row_with_gaps_in_several_tiles(by, num_rows, width, activation, gradient):
    """More than one tile of rows or of features, and a stride of its own for every matrix."""
    draw = torch.Generator().manual_seed(width)
    gate = torch.randn(num_rows, width + 3, generator=draw)[:, 1:-2].requires_grad_()
    up = torch.randn(num_rows, width + 8, generator=draw)[:, 5:-3].requires_grad_()
    upstream = torch.randn(num_rows, width + 13, generator=draw)[:, :width]
    num_selected = torch.randint(1, width + 1, (num_rows,), generator=draw)
    found, sums = fused_glu(gate, up, num_selected, by=by, activation=activation, gradient=gradient)
    want, wanted = reference.fused_glu(gate, up, num_selected, activation=activation, gradient=gradient)
    # The K-th and the next magnitude of a row may lie within rounding of each other.
    assert ((found != 0) == (want != 0)).float().mean() > 0.999
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-3)
    mine, theirs = (torch.autograd.grad(out, (gate, up), upstream) for out in (found, want))
    for ours, defined in zip((found, *mine), (want, *theirs), strict=True):
        close = torch.isclose(ours, defined, rtol=1e-4, atol=1e-5)
        assert close.float().mean() > 0.999 and ours.isfinite().all()


def test_the_native_operator_computes_fp64_in_fp64():
    by = next(by for by in FUSED_GLUS if by.name == "native")
    if reason := by.why_not(torch.device("cpu")):
        pytest.skip(reason)
    for activation in reference.ACTIVATIONS:
        gate, up = (torch.randn(2, 7, 300).double() + 1e-9).requires_grad_()
        found, sums = fused_glu(gate, up, 120, by=by, activation=activation)
        want, wanted = reference.fused_glu(gate, up, 120, activation=activation)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=0.0)
        for mine, theirs in zip(*(torch.autograd.grad(o.sum(), (gate, up)) for o in (found, want)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_every_row_of_the_native_operator_has_its_own_k_on_two_threads():
    by = next(by for by in FUSED_GLUS if by.name == "native")
    if reason := by.why_not(torch.device("cpu")):
        pytest.skip(reason)
    gate, up = torch.rand(2, 1500, 41)
    num_selected = torch.randint(1, 42, (1500,))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found, sums = fused_glu(gate, up, num_selected, by=by)
    finally:
        torch.set_num_threads(before)
    assert torch.equal((found != 0).sum(-1), num_selected)
    assert torch.equal(sums.selected_N.long(), num_selected)
