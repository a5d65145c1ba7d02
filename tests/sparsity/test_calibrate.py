"""Thresholds from a sample: exact quantiles, bounded memory, no randomness."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.sparsity.calibrate import RowSample, calibrated_threshold
from qsparse_moe.sparsity.selection import threshold_mask

torch.set_num_threads(1)


@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 2**31))
def test_exactly_the_rounded_share_lies_above_the_threshold(count, sparsity, seed):
    magnitudes = torch.randn(count, generator=torch.Generator().manual_seed(seed)).abs()
    threshold = calibrated_threshold(magnitudes, sparsity)
    assert (magnitudes > threshold).sum() == count - round(sparsity * count)


def test_natural_zeros_beyond_s_give_a_threshold_that_drops_only_them():
    assert calibrated_threshold(torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.5) == 0.0


def test_the_mask_of_the_calibrated_rows_keeps_the_share():
    x = torch.randn(64, 48)
    threshold = calibrated_threshold(x.abs().flatten(), 0.75)
    assert threshold_mask(x, torch.tensor([threshold])).double().mean() == pytest.approx(0.25, abs=1e-3)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 40))
def test_the_sample_is_evenly_spaced_bounded_and_the_same_however_the_rows_are_cut(cuts, max_rows):
    rows = torch.arange(sum(cuts), dtype=torch.float32)[:, None].expand(-1, 3)
    cut, whole = RowSample(3 * max_rows), RowSample(3 * max_rows)
    for part in rows.split(cuts):
        cut.add(part)
    whole.add(rows)
    assert torch.equal(cut.magnitudes(), whole.magnitudes())
    kept = cut.magnitudes().view(-1, 3)[:, 0]
    assert len(kept) <= max_rows
    assert len(kept) > max_rows // 2 or len(kept) == len(rows)
    assert len(kept.diff().unique()) <= 1
    assert cut.num_seen == len(rows)


@pytest.mark.parametrize(
    ("magnitudes", "message"),
    [(torch.empty(0), "at least one value"), (torch.tensor([1.0, float("nan")]), "must be finite")],
)
def test_what_cannot_be_calibrated_is_refused(magnitudes, message):
    with pytest.raises(ValueError, match=message):
        calibrated_threshold(magnitudes, 0.5)
