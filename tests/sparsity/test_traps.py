"""Traps found in public Q-Sparse code: each wrong formulation is tested here and fails where this package is right.

N rows, D features, K selected features.
"""

import pytest
import torch

from qsparse_moe.sparsity.plan import num_selected
from qsparse_moe.sparsity.quantize import fake_quantize, quantize
from qsparse_moe.sparsity.topk import apply_mask, topk_mask, topk_sparsify

torch.set_num_threads(1)
N, D, K = 6, 32, 12


def rows(dtype=torch.float32):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(3)).to(dtype)


# int8 without the 127


def int8_without_127(x):
    scale = x.abs().amax(-1, keepdim=True) + 1e-12
    return (x / scale).round().clamp(-128, 127) * scale


def num_levels(x, quantized):
    return max(len(row.unique()) for row in quantized(x))


def test_int8_has_more_than_three_values_per_row():
    x = rows()
    assert num_levels(x, int8_without_127) <= 3
    assert num_levels(x, lambda x: fake_quantize(x, "int8")) > 25
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((fake_quantize(x, "int8") - x).abs() <= 0.5001 * step).all()
    assert not ((int8_without_127(x) - x).abs() <= 0.5001 * step).all()


# one mask for the union of all rows


def union_mask(x, k):
    mask = torch.zeros(x.shape[-1], dtype=torch.bool)
    mask[x.abs().topk(k).indices.flatten()] = True
    return mask.expand_as(x)


def whole_tensor_mask(x, k):
    flat = torch.zeros(x.numel(), dtype=torch.bool)
    flat[x.abs().flatten().topk(k * len(x)).indices] = True
    return flat.view_as(x)


def every_row_keeps_its_own_k(mask_of):
    x = rows()
    alone = torch.cat([mask_of(row[None], K) for row in x])
    mask = mask_of(x, K)
    return torch.equal(mask.sum(-1), torch.full((N,), K)) and torch.equal(mask, alone)


def test_every_row_has_the_mask_that_it_has_alone():
    assert not every_row_keeps_its_own_k(union_mask)
    assert not every_row_keeps_its_own_k(whole_tensor_mask)
    assert every_row_keeps_its_own_k(topk_mask)


# everything that reaches the K-th value


def at_least_kth_mask(x, k):
    return x.abs() >= x.abs().topk(k).values[..., -1:]


@pytest.mark.parametrize("ties", [torch.ones(2, 8), torch.zeros(2, 8), torch.tensor([[3.0, -1.0, 1.0, 1.0]])])
def test_ties_do_not_make_a_row_select_more_than_k(ties):
    assert (at_least_kth_mask(ties, 2).sum(-1) > 2).all()
    assert (topk_mask(ties, 2).sum(-1) == 2).all()


def test_ties_are_frequent_in_bf16_so_the_trap_is_common():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (at_least_kth_mask(x, 200).sum(-1) > 200).double().mean() > 0.25
    assert (topk_mask(x, 200).sum(-1) == 200).all()


# K = 0


def kept_rounded_down(sparsity, num_features):
    return int((1 - sparsity) * num_features)


def test_k_is_at_least_one():
    with pytest.raises(RuntimeError):  # there is no K-th value
        at_least_kth_mask(rows(), kept_rounded_down(0.99, D))
    k = num_selected(0.99, D)
    assert k == 1
    assert (topk_mask(rows(), k).sum(-1) == 1).all()
    # Rounding down also loses a feature where the number is whole: (1 - 0.9) * 10 is below 1 in floating point.
    assert (kept_rounded_down(0.9, 10), num_selected(0.9, 10)) == (0, 1)


# an in-place mask that aliases its input


def in_place_masked(x, k):
    """A straight-through estimator as it is often written. In fp32 ``.float()`` copies nothing."""
    wide = x.float()
    wide.masked_fill_(~topk_mask(x, k), 0.0)
    return x + (wide - x).detach().to(x.dtype)


def gradient(sparsify, dtype):
    leaf = rows(dtype).requires_grad_()
    upstream = torch.randn(N, D, generator=torch.Generator().manual_seed(4)).to(dtype)
    x = leaf * 1
    before = x.detach().clone()
    out = sparsify(x, K)
    assert torch.equal(out, before * topk_mask(before, K))  # the value is right in every formulation
    return torch.autograd.grad(out, leaf, upstream)[0], upstream, torch.equal(x, before)


def test_an_aliased_mask_loses_the_straight_through_gradient_in_fp32_and_only_there():
    grad, upstream, is_untouched = gradient(in_place_masked, torch.bfloat16)
    assert torch.equal(grad, upstream)
    assert is_untouched
    grad, upstream, is_untouched = gradient(in_place_masked, torch.float32)
    assert torch.equal(grad, upstream * topk_mask(rows(), K))  # the masked gradient, under the other's name
    assert not is_untouched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_our_gradient_passes_straight_through_in_every_dtype_and_the_input_is_unchanged(dtype):
    grad, upstream, is_untouched = gradient(topk_sparsify, dtype)
    assert torch.equal(grad, upstream)
    assert is_untouched


# the mask of quantised Q-Sparse


def mask_after_rounding(x, k):
    return topk_mask(fake_quantize(x, "int4"), k)


def test_the_mask_is_taken_before_rounding_where_rounding_makes_ties():
    x = rows()
    mask = topk_mask(x, K)
    assert not torch.equal(mask_after_rounding(x, K), mask)
    selected = apply_mask(fake_quantize(x, "int4"), mask)
    assert torch.equal(selected != 0, mask & (quantize(x, "int4").codes != 0))
