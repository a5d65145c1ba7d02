"""Quantisation: the formulas, the scales, the straight-through gradient, ternary packing. N rows, D features."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qsparse_moe
from qsparse_moe.sparsity.quantize import fake_quantize, pack_ternary, quantize, unpack_ternary
from qsparse_moe.sparsity.topk import apply_mask, topk_mask

torch.set_num_threads(1)
ROW_FORMATS = ("int8", "int4")
FORMATS = (*ROW_FORMATS, "ternary")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def written_out(x, number_format):
    """The papers' formulas, in float64 and value by value."""
    rows = x.double()
    if number_format == "ternary":
        scale = rows.abs().mean((-2, -1), keepdim=True)
        return (rows / scale).round().clamp(-1, 1) * scale
    if number_format == "int8":
        scale = rows.abs().amax(-1, keepdim=True)
        return (127 * rows / scale).round().clamp(-128, 127) * scale / 127
    scale = rows.abs().mean(-1, keepdim=True)
    return (math.sqrt(7) * rows / scale).round().clamp(-8, 7) * scale / math.sqrt(7)


@st.composite
def matrices(draw):
    shape = (*draw(st.sampled_from([(), (2,), (2, 3)])), draw(st.integers(1, 9)), draw(st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * 10 ** draw(st.floats(-3, 3))
    return x.to(draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("number_format", FORMATS)
@given(matrices())
def test_values_are_those_of_the_formula_and_whole_numbers_times_the_scale(number_format, x):
    got = fake_quantize(x, number_format)
    assert got.dtype == x.dtype
    codes, scale = quantize(x, number_format)
    low, high = {"int8": (-127, 127), "int4": (-8, 7), "ternary": (-1, 1)}[number_format]
    assert torch.equal(codes, codes.round())
    assert codes.min() >= low
    assert codes.max() <= high
    # A value on the edge between two codes may round to either: its error is what counts, not its code.
    want = written_out(x, number_format)
    off = (got.double() - want).abs()
    edge = (x.double() - want).abs() > 0.499 * scale.double()
    allowed = 4 * torch.finfo(x.dtype).eps * want.abs() + 1e-6 * scale.double() + torch.finfo(x.dtype).tiny
    assert (off[~edge] <= allowed[~edge]).all()
    assert (off <= scale.double() * 1.01 + allowed).all()


@pytest.mark.parametrize("number_format", FORMATS)
def test_gradient_passes_straight_through_whatever_is_upstream(number_format):
    x = torch.randn(3, 6, 10, requires_grad=True)
    upstream = torch.randn(3, 6, 10)
    (grad,) = torch.autograd.grad(fake_quantize(x, number_format), x, upstream)
    assert torch.equal(grad, upstream)


@pytest.mark.parametrize("number_format", FORMATS)
def test_rows_or_matrices_are_independent_and_the_input_is_unchanged(number_format):
    x = torch.randn(4, 6, 10) * torch.tensor([1e-3, 1.0, 30.0, 1e4])[:, None, None]
    before = x.clone()
    whole = fake_quantize(x, number_format)
    assert torch.equal(x, before)
    for part, alone in zip(whole, x, strict=True):
        assert torch.equal(part, fake_quantize(alone, number_format))
    if number_format != "ternary":
        assert torch.equal(whole.flatten(0, 1)[7], fake_quantize(x.flatten(0, 1)[7], number_format))


def test_the_largest_magnitude_of_an_int8_row_is_exact_also_in_a_row_of_tiny_values():
    x = torch.tensor([[1.0, -3.0, 0.5], [1e-13, -3e-13, 5e-14]])
    assert quantize(x, "int8").codes.tolist() == [[42, -127, 21]] * 2
    torch.testing.assert_close(fake_quantize(x, "int8")[:, 1], x[:, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("number_format", FORMATS)
def test_rows_of_tiny_values_from_relu2_are_rounded_like_others(number_format):
    x = torch.randn(4, 32)
    small = quantize(x * 2.0**-60, number_format)
    assert torch.equal(small.codes, quantize(x, number_format).codes)


def test_int4_reaches_from_minus_8_to_7():
    x = torch.tensor([[100.0, -100.0, 1.0, 1.0, 0.0]])
    assert quantize(x, "int4").codes.tolist() == [[7, -7, 0, 0, 0]]
    x = torch.tensor([[0.0] * 30 + [5.0, -5.0]])
    assert quantize(x, "int4").codes[0, -2:].tolist() == [7, -8]


@pytest.mark.parametrize("number_format", FORMATS)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_visible(number_format):
    assert torch.equal(fake_quantize(torch.zeros(3, 5), number_format), torch.zeros(3, 5))
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(2, 3, 5)
        x[1, 2, 4] = bad
        got = fake_quantize(x, number_format)
        assert not got[1, 2].isfinite().any()
        assert got[0].isfinite().all()


def test_quantised_q_sparse_takes_its_mask_before_rounding_and_applies_both_scales():
    x = torch.tensor([[100.0, 0.9, 1.1, -1.0]])  # in int8 steps of 0.79 the last three are equal
    w = torch.randn(3, 4)
    mask = topk_mask(x, 2)
    assert mask.tolist() == [[True, False, True, False]]
    assert topk_mask(fake_quantize(x, "int8"), 2).tolist() != mask.tolist()
    y = apply_mask(fake_quantize(x, "int8"), mask) @ fake_quantize(w, "ternary").T
    codes_x, scale_x = quantize(x, "int8")
    codes_w, scale_w = quantize(w, "ternary")
    torch.testing.assert_close(y, ((codes_x * mask) @ codes_w.T) * scale_x * scale_w)


@pytest.mark.parametrize("number_format", ROW_FORMATS)
def test_gradients_of_the_quantised_sparse_linear_are_those_of_the_formula_in_float64(number_format):
    x, w = torch.randn(5, 12, requires_grad=True), torch.randn(7, 12, requires_grad=True)
    upstream, mask = torch.randn(5, 7), topk_mask(x, 4)
    y = apply_mask(fake_quantize(x, number_format), mask) @ fake_quantize(w, "ternary").T
    grads = torch.autograd.grad(y, (x, w), upstream)
    # The input's gradient ignores mask and both roundings; the weight's uses the sparse, rounded input.
    want_x = upstream.double() @ written_out(w.detach(), "ternary")
    want_w = upstream.double().T @ (written_out(x.detach(), number_format) * mask)
    torch.testing.assert_close(grads[0].double(), want_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[1].double(), want_w, rtol=1e-5, atol=1e-5)


@given(matrices())
def test_unpacking_returns_the_ternary_weight_bit_for_bit_at_two_bits_per_weight(w):
    packed, scale = pack_ternary(w)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*w.shape[:-1], -(-w.shape[-1] // 4))
    got, want = unpack_ternary(packed, scale, w.shape[-1], dtype=w.dtype), fake_quantize(w, "ternary")
    assert got.dtype == want.dtype
    assert torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8))  # not even the sign of a zero


def test_stacked_experts_have_one_ternary_scale_each():
    w = torch.randn(3, 8, 5) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    _, scale = pack_ternary(w)
    torch.testing.assert_close(scale.flatten(), w.abs().mean((1, 2)))
    assert all(len(matrix.unique()) == 3 for matrix in fake_quantize(w, "ternary"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fake_quantize(torch.ones(2, 2), "int2"), "must be int8, int4 or ternary, got 'int2'"),
        (lambda: fake_quantize(torch.ones(2), "ternary"), r"at least two dims.*got shape \(2,\)"),
        (lambda: pack_ternary(torch.full((2, 2), math.nan)), "weight must be finite to be packed"),
        (
            lambda: pack_ternary(torch.stack((torch.ones(2, 2), torch.full((2, 2), math.inf)))),
            "weight must be finite to be packed",
        ),
        (lambda: unpack_ternary(*pack_ternary(torch.ones(2, 9)), 8), r"num_columns \(8\) must need 3 bytes per row"),
        (lambda: unpack_ternary(*pack_ternary(torch.ones(2, 9)), 13), r"num_columns \(13\) must need 3 bytes per row"),
    ],
)
def test_impossible_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("number_format", FORMATS)
def test_codes_and_scales_are_no_part_of_the_graph(number_format):
    codes, scale = quantize(torch.randn(3, 4, requires_grad=True), number_format)
    assert not codes.requires_grad and not scale.requires_grad


def test_it_is_a_public_name():
    assert qsparse_moe.fake_quantize is fake_quantize
