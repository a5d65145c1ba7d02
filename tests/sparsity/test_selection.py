"""Selection by a threshold: calibrated, statistical, and ReLU. N rows, D features."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.sparsity.selection import THRESHOLD_MASKS, relu_mask, statistical_mask, threshold_mask

torch.set_num_threads(1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def as_threshold(*values):
    return torch.tensor(values) if len(values) == 1 else torch.tensor(values)[:, None]


@st.composite
def rows(draw):
    num_rows, width = draw(st.integers(0, 6)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(num_rows, width, generator=generator)
    steps = draw(st.sampled_from([0, 1, 3]))  # few distinct values make ties, some of them with the threshold
    x = (x * steps).round() / steps if steps else x
    bad = draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
    if bad is not None and num_rows:
        x[draw(st.integers(0, num_rows - 1)), draw(st.integers(0, width - 1))] = bad
    return x.to(draw(st.sampled_from(DTYPES)))


def expected(x, limits):
    """Feature by feature, in Python."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i, (row, limit) in enumerate(zip(x.double().abs().tolist(), limits, strict=True)):
        if math.isnan(limit):
            mask[i] = True
            continue
        mask[i] = torch.tensor([math.isnan(value) or value > limit for value in row])
        if not mask[i].any():
            mask[i, row.index(max(row))] = True
    return mask


@given(rows(), st.sampled_from([-math.inf, 0.0, 1 / 3, 1.0, 100.0]))
def test_threshold_selects_values_above_it_and_at_least_the_first_largest(x, threshold):
    limit = torch.tensor(threshold).item()
    assert torch.equal(threshold_mask(x, as_threshold(threshold)), expected(x, [limit] * len(x)))


def test_every_row_may_have_its_own_threshold():
    x = torch.tensor([[1.0, 2.0, 3.0]] * 4)
    mask = threshold_mask(x, as_threshold(-math.inf, 1.0, 2.5, 9.0))
    assert mask.tolist() == [[True] * 3, [False, True, True], [False, False, True], [False, False, True]]


def test_a_bf16_row_is_compared_with_the_unrounded_threshold():
    x = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)  # neighbours in bf16
    assert threshold_mask(x, as_threshold(1.005)).tolist() == [[False, True]]  # 1.005 rounds to the upper one


def test_relu_selects_what_is_above_the_threshold_by_value_and_not_by_magnitude():
    x = torch.tensor([[0.0, 0.5, -3.0, 1.0, -0.5], [-1.0, -2.0, 0.0, -0.5, 0.25]])
    assert relu_mask(x, as_threshold(0.0)).tolist() == [
        [False, True, False, True, False], [False, False, False, False, True],
    ]  # fmt: skip
    mask = relu_mask(x, as_threshold(0.5, -1.0))
    assert mask.tolist() == [[False, False, False, True, False], [False, False, True, True, True]]


@pytest.mark.filterwarnings("ignore:std:UserWarning")  # of no rows at all
@given(rows(), st.floats(0.01, 0.99))
def test_statistical_threshold_is_the_mean_plus_the_quantile_times_the_deviation_of_the_magnitudes(x, sparsity):
    quantile = NormalDist().inv_cdf(sparsity)
    magnitude = x.double().abs()
    limit = magnitude.mean(-1) + torch.tensor(quantile).double() * magnitude.std(-1, correction=0)
    got, want = statistical_mask(x, as_threshold(quantile)), expected(x, limit.tolist())
    # Rounding of the threshold in fp32 may move a feature that lies on it.
    on_the_bound = (magnitude - limit[:, None]).abs() <= 1e-5 * (1 + magnitude.amax(-1, keepdim=True))
    assert ((got == want) | on_the_bound).all()
    assert got.any(-1).all()


def test_the_deviation_is_that_of_the_row_itself_not_of_a_population_behind_it():
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0, 5.0, -6.0]])  # mean 1.83, deviation 2.61; with 5 for 6 it would be 2.86
    assert statistical_mask(x, as_threshold(1.2)).tolist() == [[False, False, False, False, True, True]]
    assert statistical_mask(x, as_threshold(1.3)).tolist() == [[False, False, False, False, False, True]]


@pytest.mark.parametrize(("sparsity", "kept"), [(0.1, 0.9797), (0.5, 0.4249), (0.9, 0.1162)])
def test_statistical_selection_selects_the_documented_fraction_of_normal_activations(sparsity, kept):
    x = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0))
    mask = statistical_mask(x, as_threshold(NormalDist().inv_cdf(sparsity)))
    assert mask.double().mean().item() == pytest.approx(kept, abs=0.005)
    # Where the magnitudes themselves are normal, the fraction is the requested one.
    shifted = statistical_mask(x + 10, as_threshold(NormalDist().inv_cdf(sparsity)))
    assert shifted.double().mean().item() == pytest.approx(1 - sparsity, abs=0.005)


@pytest.mark.parametrize("name", THRESHOLD_MASKS)
def test_nothing_is_dropped_without_a_threshold_or_from_a_row_with_nan(name):
    x = torch.randn(3, 8)
    x[0] = 0.5  # no deviation
    assert THRESHOLD_MASKS[name](x, as_threshold(-math.inf)).all()
    x[1, 2] = math.nan
    mask = THRESHOLD_MASKS[name](x, as_threshold(1e9))
    assert mask[1, 2]  # a NaN is selected for every threshold
    assert mask.any(-1).all() or name == "relu"  # only a selection by magnitude selects at least one feature of a row


def test_an_infinite_value_makes_the_statistics_select_the_whole_row():
    x = torch.randn(2, 8)
    x[0, 3] = -math.inf
    mask = statistical_mask(x, as_threshold(1.0))
    assert mask[0].all()
    assert not mask[1].all()


@pytest.mark.parametrize("name", THRESHOLD_MASKS)
def test_the_input_is_not_changed(name):
    x = torch.randn(3, 8)
    before = x.clone()
    THRESHOLD_MASKS[name](x, as_threshold(0.5))
    assert torch.equal(x, before)
