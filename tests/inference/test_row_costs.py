"""The measurement of when to read whole matrices: ties, the chosen rows, and the time of a round."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.inference import row_costs


def test_rows_are_chosen_where_both_take_the_same_time():
    asked = []

    def seconds(stored, rows_K, num_tokens):
        asked.append((num_tokens, len(rows_K)))
        # Slower by choosing above 0.8, and as fast at 0.8.
        return 2.0 if len(rows_K) in (922, 973) else 1.0

    assert row_costs.measure_shares("bf16", seconds) == [0.9] * 4
    # The whole matrix first, then from the largest share down to the first that is not slower.
    sizes = [1024, 973, 922, 819]
    assert asked == [(num_tokens, size) for num_tokens in (1, 2, 4, 8) for size in sizes]


@pytest.mark.parametrize(("share", "size"), [(0.6, 614), (0.8, 819), (0.95, 973)])
def test_chosen_rows_are_different_ascending_and_always_the_same(share, size):
    rows_K = row_costs._chosen(share)
    assert (len(rows_K), rows_K.dtype) == (size, torch.int32)
    assert rows_K.tolist() == sorted(set(rows_K.tolist())) and 0 <= rows_K[0] <= rows_K[-1] < 1024
    assert torch.equal(rows_K, row_costs._chosen(share))
    # Spread over the whole matrix, so that there are jumps.
    assert rows_K[-1] - rows_K[0] > 1000


def test_a_product_takes_the_time_of_its_fastest_round_over_all_matrices(monkeypatch):
    durations, calls = [7.0, 3.0, 9.0, 2.0, 5.0], []
    clock = iter([moment for round_, spent in enumerate(durations) for moment in (100 * round_, 100 * round_ + spent)])
    monkeypatch.setattr(row_costs.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        row_costs, "row_product_native", lambda stored, rows, values, *, which: calls.append((values.shape, which))
    )
    stored = type("Stored", (), {"num_matrices": 3})()
    assert row_costs._seconds(stored, torch.arange(6), 4) == 2.0
    assert calls == [((6, 4), which) for _ in durations for which in range(3)]


def test_a_table_that_cannot_be_written_is_measured_again_and_says_so(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QSPARSE_MOE_CACHE", str(tmp_path / "file"))
    measured = []
    monkeypatch.setattr(row_costs, "measure_shares", lambda name: measured.append(name) or [0.9, 0.8, 2.0, 0.7])
    for _ in range(2):
        assert row_costs.shares_to_read_all("int8") == [0.9, 0.8, 2.0, 0.7]
    assert measured == ["int8", "int8"] and "cannot be written" in caplog.text
    assert "the next process measures again; QSPARSE_MOE_CACHE names another folder" in caplog.text


def test_formats_and_the_bandwidth_share_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("QSPARSE_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(row_costs, "measure_shares", lambda name: [0.9, 0.8, 2.0, len(name) / 10])
    monkeypatch.setattr(row_costs, "measure_read_bandwidth", lambda: 5e9)
    assert row_costs.shares_to_read_all("bf16")[3] == 0.4
    assert row_costs.known_read_bandwidth() == 5e9
    assert row_costs.shares_to_read_all("ternary")[3] == 0.7
    monkeypatch.setattr(row_costs, "measure_shares", None)
    monkeypatch.setattr(row_costs, "measure_read_bandwidth", None)
    assert [row_costs.shares_to_read_all(name)[3] for name in ("bf16", "ternary")] == [0.4, 0.7]
    assert row_costs.known_read_bandwidth() == 5e9
    assert len(list((tmp_path / "decode").glob("*.json"))) == 1
