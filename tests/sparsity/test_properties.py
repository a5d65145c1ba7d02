"""Q-Sparse as a whole against the written-out formula in float64, over shapes, dtypes, K, ties, NaN and infinity."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.quantize import fake_quantize
from qsparse_moe.sparsity.topk import topk_mask_reference, topk_sparsify

torch.set_num_threads(1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SELECTIONS = ("topk", "block", "threshold", "statistical")


@st.composite
def cases(draw):
    """Rows, some with ties, a NaN or an infinite value, an upstream gradient and S."""
    lead = draw(st.sampled_from([(1,), (5,), (2, 3)]))
    width = 4 * draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, upstream = (torch.randn(*lead, width, generator=generator) for _ in range(2))
    steps = draw(st.sampled_from([0, 1, 3]))
    x = (x * steps).round() / steps if steps else x
    bad = draw(st.sampled_from([None, None, math.nan, math.inf, -math.inf]))
    if bad is not None:
        x.view(-1, width)[0, draw(st.integers(0, width - 1))] = bad
    dtype = draw(st.sampled_from(DTYPES))
    return x.to(dtype), upstream.to(dtype), draw(st.sampled_from([0.0, 0.25, 0.5, 0.75]))


def site(width, sparsity, **settings):
    made = SparseSite("expert_hidden", width, SparsityConfig(group_size=4, **settings), select_rows_torch)
    made.set_sparsity([sparsity], [0.7])
    return made


@pytest.mark.parametrize("selection", SELECTIONS)
@given(cases())
def test_a_site_returns_each_value_or_zero_and_never_hides_what_is_broken(selection, case):
    x, _, sparsity = case
    before = x.clone()
    got, stats = site(x.shape[-1], sparsity, selection=selection)(x, with_stats=True)
    assert got.dtype == x.dtype
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    finite = x.isfinite().all(-1)
    selected = got[finite]
    assert ((selected == x[finite]) | (selected == 0)).all()
    assert ((selected != 0).any(-1) | (x[finite] == 0).all(-1)).all()
    assert (~got[~finite].isfinite()).any(-1).all()
    assert stats["rows_E"] <= stats["selected_E"] <= x.numel()


@given(cases(), st.sampled_from(["none", "unit", "preserve"]), st.sampled_from(["ste", "masked", 0.3]))
def test_value_and_gradient_are_those_of_the_formula_in_float64(case, rescale, gradient):
    x, upstream, sparsity = case
    x = x.nan_to_num(nan=1.0, posinf=2.0, neginf=-2.0)
    num_selected = max(1, round((1 - sparsity) * x.shape[-1]))
    mask = topk_mask_reference(x, num_selected)
    x[..., 0] += (x * mask == 0).all(-1) * 1.0  # a row of zeros has no norm to divide by
    mask = topk_mask_reference(x, num_selected)

    leaf = x.clone().requires_grad_()
    got = topk_sparsify(leaf, num_selected, rescale=rescale, gradient=gradient)
    (got_grad,) = torch.autograd.grad(got, leaf, upstream)

    exact = x.double().requires_grad_()
    share = {"ste": 1.0, "masked": 0.0}.get(gradient, gradient)
    through = share * exact + (1 - share) * exact * mask
    selected = through + (exact * mask - through).detach()
    norms = [value.square().sum(-1, keepdim=True).sqrt() for value in (exact, selected)]
    want = {"none": selected, "unit": selected / norms[1], "preserve": selected * norms[0] / norms[1]}[rescale]
    (want_grad,) = torch.autograd.grad(want, exact, upstream.double())

    # The terms of a rescaled gradient cancel, so their rounding is relative to the terms and not to the result.
    terms = upstream.double().norm(dim=-1, keepdim=True) / norms[1] * (norms[0] if rescale == "preserve" else 1.0)
    sizes = (torch.zeros_like(terms), terms.detach() if rescale != "none" else torch.zeros_like(terms))
    for mine, theirs, size in zip((got, got_grad), (want, want_grad), sizes, strict=True):
        largest = torch.maximum(theirs.abs().amax(-1, keepdim=True).clamp(min=1e-3), size)
        assert ((mine.double() - theirs).abs() <= 8 * torch.finfo(x.dtype).eps * largest).all()


@given(cases(), st.sampled_from(["int8", "int4"]), st.sampled_from(SELECTIONS))
def test_a_quantised_site_masks_what_the_unquantised_one_masks(case, number_format, selection):
    x, _, sparsity = case
    x = x.nan_to_num(nan=1.0, posinf=2.0, neginf=-2.0)
    plain, _ = site(x.shape[-1], sparsity, selection=selection)(x, with_stats=False)
    config = {"selection": selection, "quantization": {"activations": number_format}}
    got, _ = site(x.shape[-1], sparsity, **config)(x, with_stats=False)
    rounded = fake_quantize(x, number_format)
    assert (got[plain != 0] == rounded[plain != 0]).all()
    assert ((got == 0) | (got == rounded)).all()
    dropped = (plain == 0) & (x != 0)
    assert (got[dropped] == 0).all()
