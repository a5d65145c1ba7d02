"""The keyed permutation: one to one, without structure, different for every key, and small."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.data.permutation import permuted
from qsparse_moe.data.sequences import train_indices


def whole(size: int, *key: int) -> np.ndarray:
    return permuted(np.arange(size), size=size, key=key)


def deviation(counts: np.ndarray, *, fewer: int = 1) -> float:
    """Distance of chi-square from its mean in standard deviations, if all counts have the same expectation."""
    expected = counts.mean()
    freedom = counts.size - fewer
    return float((((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom))


def test_every_size_up_to_2000_and_large_odd_ones_are_permuted_one_to_one() -> None:
    for size in (*range(1, 2001), 10_007, 65_535, 65_536, 65_537, 99_999):
        assert np.array_equal(np.sort(whole(size, 3, size)), np.arange(size)), size


def test_an_index_has_the_same_value_whatever_else_is_asked() -> None:
    size = 1_000_003
    places = np.array([5, 999_999, 0, 1_000_002, 5])
    together = permuted(places, size=size, key=(1, 2))
    assert together.dtype == np.int64 and together.tolist() == whole(size, 1, 2)[places].tolist()
    assert [int(permuted(np.array([place]), size=size, key=(1, 2))[0]) for place in places] == together.tolist()


@given(
    st.one_of(st.integers(1, 100), st.integers(1, 2**62)),
    st.lists(st.integers(0, 2**63), min_size=1, max_size=3),
    st.data(),
)
def test_few_indices_have_the_bits_of_many(size: int, key: list[int], data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=9, max_size=24))
    together = permuted(np.array(places), size=size, key=tuple(key))
    for count in (1, 2, 8):
        few = permuted(np.array(places[:count]), size=size, key=tuple(key))
        assert few.dtype == np.int64 and few.tolist() == together[:count].tolist()
    alone = permuted(np.array(places[0]), size=size, key=tuple(key))
    assert alone.shape == () and int(alone) == together[0]


def test_values_are_fixed_because_checkpoints_continue_in_them() -> None:
    assert whole(10, 0, 0).tolist() == [8, 5, 4, 1, 6, 9, 0, 2, 3, 7]
    assert permuted(np.array([0, 1, 2**40]), size=2**41 + 9, key=(7, 3)).tolist() == [
        905301536521,
        2033149835272,
        71969776028,
    ]


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_few_elements_are_equally_likely(size: int) -> None:
    orders = dict.fromkeys(itertools.permutations(range(size)), 0)
    for seed in range(20 * len(orders)):
        orders[tuple(whole(size, seed, 0).tolist())] += 1
    assert abs(deviation(np.array(list(orders.values())))) < 4


@pytest.mark.parametrize("size", [10, 37, 100])
def test_every_element_takes_every_place_equally_often_and_neighbours_are_unrelated(size: int) -> None:
    places, steps, fixed = np.zeros((size, size)), np.zeros(size), []
    for seed in range(1000):
        order = whole(size, seed, 1)
        places[np.arange(size), order] += 1
        steps += np.bincount(np.diff(order) % size, minlength=size)
        fixed.append(int((order == np.arange(size)).sum()))
    assert abs(deviation(places, fewer=2 * size - 1)) < 4
    assert steps[0] == 0 and abs(deviation(steps[1:])) < 4
    # A random permutation has one fixed point on average, with variance 1.
    assert np.mean(fixed) == pytest.approx(1, abs=4 / math.sqrt(1000))


def test_seeds_and_epochs_are_unrelated_and_a_part_of_an_epoch_is_spread_over_the_table() -> None:
    size, places = 200_000_000, np.arange(100_000)
    orders = [permuted(places, size=size, key=key) for key in ((5, 0), (5, 1), (6, 0), (4, 1))]
    correlations = np.corrcoef([places, *orders]) - np.eye(5)
    assert np.abs(correlations).max() < 4 / math.sqrt(len(places))
    for order in orders:
        assert abs(deviation(np.bincount(order * 100 // size, minlength=100))) < 4
        # In lowest digits too: files and shards are neighbours, and so are rows.
        assert abs(deviation(np.bincount(order % 97, minlength=97))) < 4


@pytest.mark.parametrize("rows_per_step", [1, 64])
def test_two_hundred_million_rows_take_less_than_a_megabyte_and_ten_microseconds_per_row(rows_per_step: int) -> None:
    def read(step: int) -> None:
        train_indices(step, num_sequences=200_000_000, global_batch_size=rows_per_step, seed=1, shuffle=True)

    read(0)  # what numpy imports on first use is not counted
    tracemalloc.start()
    try:
        for step in range(40):
            read(step)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    began = time.thread_time()
    num_steps = 6400 // rows_per_step
    for step in range(100, 100 + num_steps):
        read(step)
    # 2 us for single rows here, 0.2 for batches.
    assert (time.thread_time() - began) / (num_steps * rows_per_step) < 10e-6


def test_one_index_of_two_hundred_million_takes_a_few_microseconds() -> None:
    places = [np.array([place]) for place in range(3, 200_000_000, 1_000_003)]
    times = []
    for _ in range(5):
        began = time.thread_time()
        for place in places:
            permuted(place, size=200_000_000, key=(1, 2))
        times.append((time.thread_time() - began) / len(places))
    # 7 us here, where the calls of numpy take 73.
    assert min(times) < 20e-6
