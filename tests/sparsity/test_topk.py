"""Top-K selection: exactness, ties, K per row, groups, gradients. N rows, D features, K selected features."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_moe.sparsity.topk import topk_mask, topk_mask_reference, topk_sparsify

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def rows_and_num_selected(draw):
    num_rows, width = draw(st.integers(0, 7)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(num_rows, width, generator=generator)
    steps = draw(st.sampled_from([0, 1, 3]))  # few distinct values make ties
    x = (x * steps).round() / steps if steps else x
    per_row = torch.randint(1, width + 1, (num_rows,), generator=generator)
    return x.to(draw(st.sampled_from(DTYPES))), draw(st.integers(1, width)), per_row


@settings(max_examples=150, deadline=None)
@given(rows_and_num_selected())
def test_mask_is_the_first_k_of_a_stable_sort_with_one_k_and_with_one_k_per_row(case):
    x, num_selected, per_row = case
    assert torch.equal(topk_mask(x, num_selected), topk_mask_reference(x, num_selected))
    mask = topk_mask(x, per_row)
    assert torch.equal(mask, topk_mask_reference(x, per_row))
    assert torch.equal(mask.sum(-1), per_row)


def test_ties_go_to_the_lower_index():
    x = torch.tensor([[1.0, -2.0, 2.0, 2.0, 0.0]])
    assert topk_mask(x, 2).tolist() == [[False, True, True, False, False]]
    # The usual formulation, ">= K-th value", selects three.
    assert (x.abs() >= x.abs().topk(2).values[..., -1:]).sum() == 3


def test_a_row_of_zeros_selects_its_first_k():
    assert topk_mask(torch.zeros(1, 4), 3).tolist() == [[True, True, True, False]]


def test_every_row_has_its_own_mask():
    x = torch.tensor([[3.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    assert topk_mask(x, 1).tolist() == [[True, False, False], [False, True, False]]


def test_nan_and_infinity_are_selected_and_never_dropped():
    x = torch.tensor([[1.0, float("nan"), 5.0, float("-inf")]])
    assert topk_mask(x, 2).tolist() == [[False, True, False, True]]
    assert topk_mask(x, torch.tensor([1])).tolist() == [[False, True, False, False]]
    assert topk_sparsify(x, 1).isnan().any()


@pytest.mark.parametrize("num_selected", [8, torch.tensor([8, 8, 8])])
def test_every_group_selects_its_own_fraction(num_selected):
    x = torch.randn(3, 32)
    mask = topk_mask(x, num_selected, group_size=8)
    assert torch.equal(mask, topk_mask(x.view(3, 4, 8), 2).view(3, 32))
    assert (mask.view(3, 4, 8).sum(-1) == 2).all()


def test_rows_of_several_dims_with_a_k_each_are_those_of_the_flattened_rows():
    x = torch.tensor([1.0, -1.0, 0.0, 2.0, 1.0, -2.0]).repeat(2, 3, 1)  # ties at every K
    x[0, 1], x[1, 2] = x[0, 1].flip(0), -x[1, 2].roll(2)
    per_row = torch.tensor([[1, 5, 3], [2, 6, 4]])
    mask = topk_mask(x, per_row)
    for b, s in itertools.product(range(2), range(3)):
        order = sorted(range(6), key=lambda i: (-abs(x[b, s, i].item()), i))
        assert mask[b, s].nonzero().flatten().tolist() == sorted(order[: per_row[b, s]]), (b, s)
    assert torch.equal(topk_mask(x.transpose(0, 1), per_row.T), mask.transpose(0, 1))


def test_every_row_divides_its_own_k_over_its_groups():
    x = torch.randn(2, 3, 12)
    per_row = torch.tensor([[3, 6, 12], [9, 3, 6]])
    mask = topk_mask(x, per_row, group_size=4)
    for b, s in itertools.product(range(2), range(3)):
        groups = [topk_mask(part, per_row[b, s].item() // 3) for part in x[b, s].split(4)]
        assert torch.equal(mask[b, s], torch.cat(groups)), (b, s)


@pytest.mark.parametrize("gradient", ["ste", "masked", 0.0, 0.25, 1.0])
@pytest.mark.parametrize("rescale", ["none", "unit", "preserve"])
def test_value_and_gradient_match_the_written_out_formula(rescale, gradient):
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 12, dtype=torch.float64)
    mask = topk_mask_reference(x, 5).double()
    share = {"ste": 1.0, "masked": 0.0}.get(gradient, gradient)
    through = share * x + (1 - share) * x * mask
    masked = through + (x * mask - through).detach()  # value x*mask, gradient of `through`
    norm = masked.norm(dim=-1, keepdim=True)
    want = {"none": masked, "unit": masked / norm, "preserve": masked * x.norm(dim=-1, keepdim=True) / norm}[rescale]
    got = topk_sparsify(x, 5, rescale=rescale, gradient=gradient)
    torch.testing.assert_close(got, want)
    (want_grad,) = torch.autograd.grad(want, x, upstream)
    (got_grad,) = torch.autograd.grad(got, x, upstream)
    torch.testing.assert_close(got_grad, want_grad)


def test_straight_through_reaches_dropped_features_and_masked_does_not():
    x = torch.randn(4, 10, requires_grad=True)
    upstream = torch.randn(4, 10)
    dropped = ~topk_mask(x, 3)
    ste = torch.autograd.grad(topk_sparsify(x, 3), x, upstream)[0]
    masked = torch.autograd.grad(topk_sparsify(x, 3, gradient="masked"), x, upstream)[0]
    assert torch.equal(ste, upstream)
    assert (masked[dropped] == 0).all()
    assert torch.equal(masked[~dropped], upstream[~dropped])


def test_the_input_is_not_changed_and_not_aliased():
    x = torch.randn(4, 10)
    before = x.clone()
    topk_sparsify(x, 10).zero_()
    assert torch.equal(x, before)


def test_rescaling_a_row_of_zeros_leaves_zeros_and_a_gradient_of_zero():
    for rescale in ("unit", "preserve"):
        x = torch.zeros(2, 6, requires_grad=True)
        out = topk_sparsify(x, 2, rescale=rescale)
        out.backward(torch.ones(2, 6))
        assert torch.equal(out, torch.zeros(2, 6))
        assert torch.equal(x.grad, torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("num_selected", "group_size", "message"),
    [
        (0, None, r"num_selected must lie in \[1, 12\].*got 0"),
        (13, None, r"num_selected must lie in \[1, 12\].*got 13"),
        (torch.tensor([1]), None, r"integer tensor of shape \(3,\).*got torch\.int64 of shape \(1,\)"),
        (torch.tensor([[1, 2, 3]]), None, r"integer tensor of shape \(3,\).*got torch\.int64 of shape \(1, 3\)"),
        (torch.tensor([3]), 4, r"integer tensor of shape \(3,\).*got torch\.int64 of shape \(1,\)"),
        (0, 4, r"num_selected must lie in \[1, 4\].*got 0"),
        (torch.ones(3), None, "integer tensor"),
        (6, 5, r"group_size must divide 12 \(the last dim of x\), got 5"),
        (6, 0, r"group_size must divide 12 \(the last dim of x\), got 0"),
        (6, -4, r"group_size must divide 12 \(the last dim of x\), got -4"),
        (5, 4, r"must be whole, got 5 \* 4 / 12; choose num_selected as a multiple of 3"),
    ],
)
def test_impossible_k_is_refused(num_selected, group_size, message):
    with pytest.raises(ValueError, match=message):
        topk_mask(torch.randn(3, 12), num_selected, group_size=group_size)


@pytest.mark.parametrize("rescale", ["unit", "preserve"])
def test_rescaling_in_bf16_stays_within_its_rounding_of_the_exact_value_and_gradient(rescale):
    rows, upstream = torch.randn(6, 64), torch.randn(6, 64)

    def run(dtype):
        x = rows.bfloat16().to(dtype).requires_grad_()
        out = topk_sparsify(x, 20, rescale=rescale)
        return out, torch.autograd.grad(out, x, upstream.bfloat16().to(dtype))[0]

    for narrow, exact in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert narrow.dtype == torch.bfloat16
        assert (narrow.double() - exact).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("rescale", ["unit", "preserve"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rescaled_values_are_rounded_once_because_norms_are_wider(rescale, dtype):
    x = torch.randn(200, 96).to(dtype)
    found, exact = (topk_sparsify(x.to(wide), 40, rescale=rescale).double() for wide in (dtype, torch.float64))
    unit = torch.finfo(dtype).eps / 2
    assert ((found - exact).abs() <= 1.01 * unit * exact.abs()).all()


@pytest.mark.parametrize("rescale", ["unit", "preserve"])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_rescaling_rows_of_extreme_size_keeps_the_gradient_finite_and_right(rescale, scale):
    # Met in training: after ReLU² a row can hold values near 1e-15, whose norm cubed is no fp32 number.
    rows, upstream = (torch.randn(4, 16) * scale), torch.randn(4, 16)

    def gradient(dtype):
        x = rows.to(dtype).requires_grad_()
        return torch.autograd.grad(topk_sparsify(x, 6, rescale=rescale), x, upstream.to(dtype))[0]

    exact = gradient(torch.float64)
    assert (gradient(torch.float32).double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("gradient", ["sst", 1.5, -0.1])
def test_unknown_gradient_is_refused(gradient):
    with pytest.raises(ValueError, match=rf"gradient must be ste, masked.*\[0, 1\], got {gradient!r}"):
        topk_sparsify(torch.randn(2, 4), 2, gradient=gradient)
