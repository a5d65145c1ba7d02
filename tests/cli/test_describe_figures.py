"""The output of describe, written out by hand: units of bytes, and bars as fractions of all weights."""

from __future__ import annotations

import pytest

from qsparse_moe.cli.describe import _size, _traffic_table


@pytest.mark.parametrize(
    "num_bytes, want",
    [(999, "999 B"), (1000, "1 KB"), (1024, "1.02 KB"), (2_500_000, "2.5 MB"), (1e9, "1 GB"), (5e15, "5e+03 TB")],
)
def test_bytes_are_printed_in_decimal_units_with_one_to_three_digits(num_bytes, want):
    assert _size(num_bytes) == want


def test_a_bar_of_forty_characters_is_all_weights():
    point = {"batch": 2, "stored": 4000.0, "routed": 2000.0, "kept": 500.0}
    (bar,) = _traffic_table({"measured": None, "bytes_read": [point]}).columns[1].cells
    assert bar == "█" * 5 + "░" * 15
