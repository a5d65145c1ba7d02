"""Thresholds from a sample: exact quantiles, bounded memory, no randomness."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.sparsity.row_sample import MAX_VALUES, RowSample, calibrated_threshold
from qsparse_moe.sparsity.selection import threshold_mask

torch.set_num_threads(1)


@given(st.integers(1, 200), st.floats(0, 0.99), st.integers(0, 2**31))
def test_exactly_the_rounded_fraction_lies_above_the_threshold(count, sparsity, seed):
    magnitudes = torch.randn(count, generator=torch.Generator().manual_seed(seed)).abs()
    threshold = calibrated_threshold(magnitudes, sparsity)
    assert (magnitudes > threshold).sum() == count - round(sparsity * count)


def test_natural_zeros_beyond_s_give_a_threshold_that_drops_only_them():
    assert calibrated_threshold(torch.tensor([0.0, 0.0, 0.0, 1.0]), 0.5) == 0.0


def test_the_mask_of_the_calibrated_rows_selects_the_requested_fraction():
    x = torch.randn(64, 48)
    threshold = calibrated_threshold(x.abs().flatten(), 0.75)
    assert threshold_mask(x, torch.tensor([threshold])).double().mean() == pytest.approx(0.25, abs=1e-3)


def numbered(numbers):
    """A row of three features for every number, which shows it."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 3), torch.tensor(numbers)


def kept_numbers(sample):
    return sample.magnitudes().view(-1, 3)[:, 0]


@given(st.integers(1, 400), st.integers(1, 40))
def test_the_sample_is_bounded_and_evenly_spaced(num_rows, max_rows):
    sample = RowSample(3 * max_rows + 2)
    sample.add(*numbered(range(num_rows)))
    kept = kept_numbers(sample).sort().values
    assert len(kept) == min(num_rows, max_rows)
    # Of multiples of the golden ratio the longest distance is the sum of the two shorter ones, which are its parts.
    gaps = kept.diff().unique()
    assert len(gaps) <= 3
    assert not len(gaps) or gaps[-1] <= 3 * gaps[0]
    assert sample.num_seen == num_rows


@given(
    st.lists(st.integers(0, 500), max_size=60, unique=True),
    st.lists(st.integers(0, 2), min_size=60, max_size=60),
    st.integers(1, 20),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_the_sample_is_the_same_in_any_order_batches_and_processes(numbers, owners, size, max_rows, draw):
    whole = RowSample(3 * max_rows)
    whole.add(*numbered(numbers))
    ranks = [RowSample(3 * max_rows) for _ in range(3)]
    for rank, sample in enumerate(ranks):
        own = [number for number, owner in zip(numbers, owners, strict=False) if owner == rank]
        draw.shuffle(own)
        for begin in range(0, len(own), size):
            sample.add(*numbered(own[begin : begin + size]))
    merged, *others = ranks
    for other in others:
        merged.merge(other)
    assert torch.equal(merged.magnitudes(), whole.magnitudes())
    assert merged.num_seen == whole.num_seen == len(numbers)


def test_the_sample_covers_all_positions_of_rows_whose_length_is_a_power_of_two():
    sample = RowSample(3 * 64)
    sample.add(*numbered(range(64 * 256)))
    positions = kept_numbers(sample) % 256
    assert len(positions.unique()) >= 60
    assert all(((positions >= low) & (positions < low + 64)).sum() in range(12, 21) for low in range(0, 256, 64))


def test_the_sample_contains_a_row_longer_than_its_limit_and_none_of_an_empty_batch():
    sample = RowSample(2)
    sample.add(*numbered([5, 6]))
    assert len(sample.magnitudes()) == 3
    empty = RowSample(6)
    empty.add(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    sample.merge(empty)
    empty.merge(sample)
    assert torch.equal(empty.magnitudes(), sample.magnitudes()) and empty.num_seen == sample.num_seen == 2


def test_the_sample_stores_magnitudes_and_does_not_keep_their_source_in_memory():
    sample = RowSample(6)
    rows = -torch.ones(100, 3, dtype=torch.bfloat16)
    sample.add(rows, torch.arange(100))
    kept = sample.magnitudes()
    assert kept.dtype == torch.float32 and kept.tolist() == [1.0] * 6
    assert kept.untyped_storage().nbytes() == 6 * 4
    assert MAX_VALUES * 4 == 2**20, "a mebibyte per sample"


def test_a_full_sample_copies_only_the_rows_that_displace_others(monkeypatch):
    sample, stored = RowSample(3 * 4), []
    whole = RowSample(3 * 40)
    whole.add(*numbered(range(40)))
    in_order = kept_numbers(whole).int().tolist()
    first, others = in_order[:4], in_order[4:]
    store = RowSample._store
    monkeypatch.setattr(RowSample, "_store", lambda self, *new: stored.append(len(new[1])) or store(self, *new))
    sample.add(*numbered([first[2], *others[:10]]))
    sample.add(*numbered([first[0], *others[10:20], first[3], first[1]]))
    assert stored == [4, 3] and kept_numbers(sample).tolist() == first
    sample.add(*numbered(others[20:]))
    assert stored == [4, 3] and sample.num_seen == 40
    assert sample._order.untyped_storage().nbytes() == 4 * 8, "not a view of the seven that were sorted"


@pytest.mark.parametrize(
    ("magnitudes", "message"),
    [
        (torch.empty(0), "at least one value"),
        (torch.tensor([1.0, float("nan")]), "must be finite"),
        (torch.tensor([float("inf"), 1.0]), "must be finite"),
    ],
)
def test_values_that_cannot_be_calibrated_are_refused(magnitudes, message):
    with pytest.raises(ValueError, match=message):
        calibrated_threshold(magnitudes, 0.5)
