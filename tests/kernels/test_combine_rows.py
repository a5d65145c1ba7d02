"""The weighted sum of rows beyond the cases of the registry: rounded once, and sums without weights."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels import native, tiles
from qsparse_moe.kernels.combine_rows import reference
from qsparse_moe.kernels.combine_rows.op import NATIVE, TORCH, TRITON, combine_rows

T, A, D = 6, 8, 11


@pytest.fixture(params=[TORCH, NATIVE, TRITON], ids=lambda by: by.name)
def by(request):
    reasons = {"native": native.why_not, "triton": tiles.why_not}
    reason = reasons[request.param.name](torch.device("cpu")) if request.param.name in reasons else None
    if reason:
        pytest.skip(reason)
    if request.param.name == "native":
        native.load()
    return request.param


def choices():
    """``row_TA`` and ``slot_N`` of rows in no order."""
    slot_N = torch.randperm(T * A, generator=torch.Generator().manual_seed(1))
    row_TA = torch.empty_like(slot_N).scatter_(0, slot_N, torch.arange(T * A)).view(T, A)
    return row_TA, slot_N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_of_eight_rows_is_rounded_once(by, dtype):
    row_TA, slot_N = choices()
    # Whole numbers and powers of two, so that fp32 holds every sum exactly in any order, and the dtype does not.
    rows = torch.randint(-127, 128, (T * A, D), generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = 2.0 ** -torch.arange(A).expand(T, A)
    exact = (rows[row_TA].double() * weights[..., None].double()).sum(1)
    assert (exact != exact.to(dtype).double()).float().mean() > 0.5
    assert torch.equal(combine_rows(rows, weights, row_TA, slot_N, by=by), exact.to(dtype))


def test_without_weights_the_rows_are_added_unchanged(by):
    row_TA, _ = choices()
    rows = torch.randn(T * A, D)
    torch.testing.assert_close(by.forward(rows, row_TA, None), rows[row_TA].sum(1))


def test_strided_gradients_are_read_by_their_stride(by):
    row_TA, slot_N = choices()
    rows, weights = torch.randn(T * A, D), torch.rand(T, A)
    upstream = torch.randn(T, D + 6)[:, 3 : D + 3]
    want = by.backward(upstream.contiguous(), rows, weights, slot_N)
    torch.testing.assert_close(by.backward(upstream, rows, weights, slot_N), want)
    token_N = slot_N // A
    torch.testing.assert_close(want[0], upstream[token_N] * weights.flatten()[slot_N, None])


def test_every_argument_may_have_strides(by):
    row_TA, slot_N = choices()
    draw = torch.Generator().manual_seed(4)
    # Transposed, so that no dimension of any argument is contiguous.
    rows = torch.randn(D, T * A, generator=draw).T.requires_grad_()
    weights = torch.randn(A, T, generator=draw).T.requires_grad_()
    upstream = torch.randn(D, T, generator=draw).T
    arguments = (row_TA.T.contiguous().T, slot_N)
    assert not any(x.is_contiguous() for x in (rows, weights, upstream, arguments[0]))
    found, want = combine_rows(rows, weights, *arguments, by=by), reference.combine_rows(rows, weights, *arguments)
    torch.testing.assert_close(found, want)
    mine, theirs = (torch.autograd.grad(out, (rows, weights), upstream) for out in (found, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    plain = by.forward(rows.detach(), arguments[0], None)
    torch.testing.assert_close(plain, rows.detach()[row_TA].sum(1))


@pytest.mark.parametrize(("num_tokens", "num_features"), [(37, 70), (3, 2100)])
def test_dropped_choices_of_many_tokens_in_several_tiles(by, num_tokens, num_features):
    """Three choices per token, some without a row, rows with gaps, and more than one tile of tokens or of features."""
    draw = torch.Generator().manual_seed(3)
    slot_N = torch.randperm(3 * num_tokens, generator=draw)[: 2 * num_tokens]
    row_TA = torch.zeros(3 * num_tokens, dtype=torch.int64).scatter_(0, slot_N, torch.arange(len(slot_N)))
    has_row_TA = torch.zeros(3 * num_tokens).index_fill_(0, slot_N, 1.0).view(-1, 3)
    weights = (torch.randn(num_tokens, 3, generator=draw) * has_row_TA).requires_grad_()
    rows = torch.randn(len(slot_N), num_features + 9, generator=draw)[:, 4:-5].requires_grad_()
    upstream = torch.randn(num_tokens, num_features, generator=draw)
    found = combine_rows(rows, weights, row_TA.view(-1, 3), slot_N, by=by)
    want = reference.combine_rows(rows, weights, row_TA.view(-1, 3), slot_N)
    torch.testing.assert_close(found, want)
    mine, theirs = (torch.autograd.grad(out, (rows, weights), upstream) for out in (found, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_the_native_sum_of_rows_in_fp64_is_computed_in_fp64():
    if reason := native.why_not(torch.device("cpu")):
        pytest.skip(reason)
    row_TA, slot_N = choices()
    rows, weights = torch.randn(T * A, D, dtype=torch.float64), torch.rand(T, A, dtype=torch.float64)
    rows.requires_grad_(), weights.requires_grad_()
    upstream = torch.randn(T, D).double()
    found = combine_rows(rows, weights, row_TA, slot_N, by=NATIVE)
    want = reference.combine_rows(rows, weights, row_TA, slot_N)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(*(torch.autograd.grad(o, (rows, weights), upstream) for o in (found, want)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
