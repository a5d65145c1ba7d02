"""Counts in bins of the logarithm: by hand, at the edges, and the same however the values are cut."""

import torch

from qsparse_moe.sparsity.log_counts import MAGNITUDES, PROBABILITIES, LogBins, log_counts

BINS = LogBins(-2, 1, 2)


def test_values_are_counted_between_the_published_edges():
    assert BINS.edges == [-2, -1.5, -1, -0.5, 0, 0.5, 1]
    values = torch.tensor([[0.26, 0.3], [0.5, 1.0], [1.5, 1.9]])
    assert log_counts(values, BINS).tolist() == [2, 0, 1, 0, 1, 2]


def test_values_beyond_the_range_count_in_the_last_bin_and_zeros_in_the_first():
    assert log_counts(torch.tensor([0.0, 1e-30, 2.0, 1e30]), BINS).tolist() == [2, 0, 0, 0, 0, 2]
    assert log_counts(torch.empty(0), BINS).tolist() == [0] * BINS.number


def test_parts_add_up_to_the_whole_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = torch.randn(1000).abs().to(dtype)
        parts = sum(log_counts(part, MAGNITUDES) for part in values.split(77))
        whole = log_counts(values, MAGNITUDES)
        assert torch.equal(parts, whole) and whole.sum() == 1000


def test_the_published_bins_are_eighths_of_an_octave():
    for bins, low, high, number in ((PROBABILITIES, -20, 0, 160), (MAGNITUDES, -24, 8, 256)):
        assert (bins.number, bins.edges[0], bins.edges[1], bins.edges[-1]) == (number, low, low + 0.125, high)


def test_a_narrow_value_is_counted_by_its_logarithm_in_double_precision():
    # log2 is 0.119, just below the second bin of the octave; among the bf16 numbers near -20 it would be 0.125.
    value = torch.tensor([1.0859375 * 2.0**-20], dtype=torch.bfloat16)
    (filled,) = log_counts(value, MAGNITUDES).nonzero()
    assert MAGNITUDES.edges[filled] == -20
