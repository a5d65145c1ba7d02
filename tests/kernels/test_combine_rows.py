"""The weighted sum of rows beyond the cases of the registry: rounded once, and sums without weights."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.kernels import native, tiles
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
