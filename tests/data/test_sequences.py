from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_moe.data.permutation import permuted
from qsparse_moe.data.sequences import (
    EARLIER_ORDER,
    ORDERS,
    SequenceTable,
    evenly_spaced_indices,
    mixture_counts,
    train_indices,
)
from qsparse_moe.data.stored import SequenceArray


def make_side(num_rows: int, first: int) -> SequenceArray:
    """Rows of three tokens whose first token counts up from ``first``; each row has that many bytes."""
    values = np.arange(first, first + num_rows)
    rows = np.stack([values, values + 1, values + 2], axis=1).astype(np.uint16)
    return SequenceArray(rows, values.astype(np.int64), np.eye(256, dtype=np.int64)[first % 256] * len(values))


def make_table(sides: list[SequenceArray], weights: list[float]) -> SequenceTable:
    return SequenceTable(sides, weights, document_token=65535, attend_across_documents=False)


def test_sequences_of_all_sources_are_numbered_one_after_another() -> None:
    table = make_table([make_side(5, 10), make_side(1, 50), make_side(4, 100)], [1, 1, 1])
    firsts = [10, 11, 12, 13, 14, 50, 100, 101, 102, 103]
    assert len(table) == 10 and table.sequence_length == 2
    assert table.tokens(range(10))[:, 0].tolist() == firsts
    batch = table.sequences([9, 0, 5, 0])
    assert batch.tokens_BS.tolist() == [[103, 104], [10, 11], [50, 51], [10, 11]]
    assert batch.targets_BS.tolist() == [[104, 105], [11, 12], [51, 52], [11, 12]]
    assert table.num_bytes([9, 0, 0]) == 103 + 10 + 10


def test_a_weighted_source_is_repeated_in_order() -> None:
    table = make_table([make_side(4, 10), make_side(3, 50)], [1, 2])
    assert table.tokens(range(len(table)))[:, 0].tolist() == [10, 11, 12, 13, 50, 51, 52, 50, 51, 52, 50, 51]
    assert table.num_bytes([11]) == 51
    assert (table.byte_counts[10], table.byte_counts[50]) == (4, pytest.approx(3 * 8 / 3))


def test_a_sequence_outside_the_table_is_an_internal_error() -> None:
    table = make_table([make_side(4, 10)], [1])
    for index in (-1, 4):
        with pytest.raises(AssertionError, match="outside"):
            table.tokens([index])


SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=5)


@given(SIZES, st.data())
def test_weights_are_fractions_and_no_sequence_is_lost(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    counts = mixture_counts(sizes, weights)
    assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    if any(weight != 1 for weight in weights):
        assert any(count == size for count, size in zip(counts, sizes, strict=True)), "the epoch is the shortest one"
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight / sum(weights) * sum(counts)) <= 1 + len(sizes)


def test_equal_weights_of_one_read_everything_once_and_others_do_not() -> None:
    assert mixture_counts([100, 7, 0], [1, 1, 1]) == [100, 7, 0]
    assert mixture_counts([100, 10], [2, 2]) == [100, 100]
    assert mixture_counts([100, 10], [0.75, 0.25]) == [100, 33]
    assert mixture_counts([100, 10], [0.25, 0.75]) == [100, 300]
    assert mixture_counts([100, 10], [0.6, 0.4]) == [100, 67]
    assert mixture_counts([100, 0], [1, 3]) == [100, 0]


def slow_rows(num_places: int, num_sequences: int, seed: int, order: str) -> list[int]:
    rows: list[int] = []
    for epoch in range(num_places // num_sequences + 1):
        if order == EARLIER_ORDER:
            rows += np.random.default_rng((seed, epoch)).permutation(num_sequences).tolist()
        else:
            rows += permuted(np.arange(num_sequences), size=num_sequences, key=(seed, epoch)).tolist()
    return rows[:num_places]


@pytest.mark.parametrize("order", ORDERS)
@given(st.one_of(st.integers(1, 20), st.integers(1020, 1030)), st.integers(1, 9), st.integers(0, 3))
def test_steps_read_one_endless_sequence_of_shuffled_epochs(
    order: str, num_sequences: int, batch: int, seed: int
) -> None:
    # The last step of so few that every one is checked, and for a longer epoch those around its end.
    begin = max(0, num_sequences // batch - 2)
    steps = {
        step: train_indices(
            step, num_sequences=num_sequences, global_batch_size=batch, seed=seed, shuffle=True, order=order
        ).tolist()
        for step in (begin + 3, begin + 1, begin, begin + 2, begin + 4)
    }
    rows = [row for step in sorted(steps) for row in steps[step]]
    assert rows == slow_rows((begin + 5) * batch, num_sequences, seed, order)[begin * batch :]


def test_epochs_and_seeds_have_different_orders_and_every_sequence_once() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        return train_indices(epoch, num_sequences=50, global_batch_size=50, seed=seed, shuffle=True).tolist()

    orders = [order(0, 0), order(1, 0), order(0, 1)]
    assert all(sorted(rows) == list(range(50)) for rows in orders)
    assert len({tuple(rows) for rows in orders}) == 3


def test_without_shuffle_sequences_come_in_order() -> None:
    assert train_indices(1, num_sequences=5, global_batch_size=3, seed=0, shuffle=False).tolist() == [3, 4, 0]


def test_evaluation_sequences_are_evenly_spaced_over_the_table() -> None:
    assert evenly_spaced_indices(4, 10).tolist() == [0, 2, 5, 7]
    assert evenly_spaced_indices(20, 3).tolist() == [0, 1, 2]


def test_epochs_are_the_sequences_taken_divided_by_the_sequences_of_the_source() -> None:
    table = make_table([make_side(4, 10), make_side(3, 50), make_side(0, 90)], [1, 2, 3])
    # An epoch has 4 rows of the first source and 8 of the second, whose 3 rows are read 8/3 times.
    assert table.epochs(12) == pytest.approx([1, 8 / 3, 0])
    assert table.epochs(6) == pytest.approx([0.5, 4 / 3, 0])
    assert evenly_spaced_indices(4, 0).tolist() == evenly_spaced_indices(0, 4).tolist() == []
