"""The documents over which sensitivities are summed, and the bootstrap over them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from qsparse_moe.ablation.sensitivity.documents import bootstrap_intervals, training_documents, validation_documents
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.marks import mark
from qsparse_moe.data.sequences import SequenceTable, evenly_spaced_indices
from qsparse_moe.data.stored import SequenceArray


def data_of(tokens, evaluated=range(0, 12, 2)):
    """Return data for both kinds of sequences; ``evaluated`` are those of validation, by default every other of 12."""

    side = SequenceArray(tokens, np.full(len(tokens), 4), np.zeros(256))
    table = SequenceTable([side], [1], document_token=0, attend_across_documents=False)

    class Data:
        train = validation = table

        def evaluation_sequences(self, num_sequences):
            return table, np.array(evaluated)[:num_sequences]

        def batch(self, rows):
            return table.batch(rows)

        def open_stream(self, parts, **_):
            return None

    return Data()


def test_documents_of_validation_sequences_are_numbered_through_the_table_and_of_training_sequences_one_by_one():
    tokens = np.arange(1, 61).reshape(12, 5)
    for row, column in ((0, 0), (1, 2), (4, 0), (6, 3), (8, 1)):
        tokens[row, column] = 0
    data = data_of(tokens)
    rows = validation_documents(data, num_sequences=6, batch_size=4)
    # Row 2 belongs to the document that row 1 began, and row 10 to the one of row 8.
    assert torch.cat(rows.documents).tolist() == [[0] * 4, [1] * 4, [2] * 4, [2, 2, 2, 3], [3, 4, 4, 4], [4] * 4]
    assert rows.labels_C.tolist() == [4, 4, 7, 2, 7] and [len(ids) for ids in rows.documents] == [4, 2]
    assert torch.cat([batch.tokens_BS for batch in rows.batches]).tolist() == tokens[::2, :-1].tolist()
    trained = training_documents(RunConfig(), data, num_sequences=6, batch_size=4)
    read = torch.cat([batch.tokens_BS for batch in trained.batches])
    assert read.tolist() == tokens[evenly_spaced_indices(6, 12), :-1].tolist()
    ids = torch.cat(trained.documents)
    assert trained.num_documents == int(ids.max()) + 1 == 6 + int((read[:, 1:] == 0).sum())
    for one, other in itertools.pairwise(ids):
        assert other[0] == one[-1] + 1, "every row begins another document"
    assert ((ids[:, 1:] != ids[:, :-1]) == (read[:, 1:] == 0)).all()


def test_a_conversation_is_a_document_with_its_answers_as_labels():
    # Of three and two tokens, with one and two targets, though the id of the document token is within the first.
    one, two = (
        mark(np.array([7, 0, 8]), targets=np.array([0, 1, 0])),
        mark(np.array([3, 4, 5]), targets=np.array([0, 1, 1])),
    )
    tokens = np.stack([np.concatenate(pair) for pair in ((one, two), (two, one))])
    for rows in (
        validation_documents(data_of(tokens, [0, 1]), num_sequences=2, batch_size=2),
        training_documents(RunConfig(), data_of(tokens), num_sequences=2, batch_size=1),
    ):
        assert torch.cat(rows.documents).tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 3, 3]]
        assert rows.labels_C.tolist() == [1, 2, 2, 1]


def test_documents_are_numbered_through_tables_that_are_larger_than_one_read():
    tokens = np.random.default_rng(0).integers(0, 9, (2600, 5))
    tokens[1024, 0] = tokens[2047, 3] = 0
    tokens[1023], tokens[2048] = 5, 5  # the rows at the borders, where a document continues from one part into the next
    wanted = [1, 1022, 1023, 1024, 1025, 2047, 2048, 2049, 2599]
    rows = validation_documents(data_of(tokens, wanted), num_sequences=9, batch_size=4)
    number, of_label = 0, []
    for row in tokens[:, :-1].tolist():
        of_label.append([])
        for token in row:
            number += token == 0
            of_label[-1].append(number)
    met = sorted({number for row in wanted for number in of_label[row]})
    expected = [[met.index(number) for number in of_label[row]] for row in wanted]
    assert torch.cat(rows.documents).tolist() == expected and rows.num_documents == len(met)


def test_bootstrap_intervals_have_their_nominal_coverage_and_are_exact_for_a_constant():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        labels_C = generator.integers(5, 50, 40).astype(float)
        sums_XC = (labels_C * generator.normal(0.3, 1.0, 40))[None]
        low, high = bootstrap_intervals(sums_XC, labels_C, draws=300, seed=trial)
        hits += low[0] <= 0.3 <= high[0]
    assert 0.86 <= hits / 200 <= 0.99
    low, high = bootstrap_intervals(0.5 * labels_C[None], labels_C, draws=50)
    assert low[0] == pytest.approx(0.5) and high[0] == pytest.approx(0.5)


@pytest.mark.parametrize(("level", "ends"), [(0.4, (1.5, 1.5)), (0.6, (0.0, 3.0)), (0.9, (0.0, 3.0))])
def test_each_end_of_an_interval_leaves_out_half_of_the_rest(level, ends):
    """Of two documents, a quarter of the resamples is twice the first one, half is both, and a quarter the second."""
    low, high = bootstrap_intervals(np.array([[0.0, 12.0]]), np.array([4.0, 4.0]), draws=4000, level=level)
    assert (low[0], high[0]) == ends


def test_halves_are_every_second_batch_and_a_single_batch_is_both():
    tokens = np.arange(1, 61).reshape(12, 5)
    tokens[:, 0] = 0
    rows = training_documents(RunConfig(), data_of(tokens), num_sequences=10, batch_size=2)
    one, other = rows.halves()
    assert [batch.tokens_BS.tolist() for batch in one.batches] == [b.tokens_BS.tolist() for b in rows.batches[::2]]
    assert [ids.tolist() for ids in other.documents] == [ids.tolist() for ids in rows.documents[1::2]]
    np.testing.assert_array_equal(one.labels_C + other.labels_C, rows.labels_C)
    assert one.num_documents == rows.num_documents and one.first(2).halves() == (one.first(2), one.first(2))
    assert rows.first(3).num_sequences == 4 and rows.first(99).num_sequences == 10
