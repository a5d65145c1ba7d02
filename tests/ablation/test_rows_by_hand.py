"""Figures of grids and of budgets, written out by hand."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from qsparse_moe.ablation.allocation.compare import DENSE, UNIFORM, comparisons
from qsparse_moe.ablation.allocation.report import NO_GAP, comparison_rows
from qsparse_moe.ablation.grid.placement import Placement
from qsparse_moe.ablation.sensitivity.documents import bootstrap_intervals


def test_threads_share_the_cores_among_all_processes_of_all_runs():
    assert Placement(ranks=2, jobs=3).environment((), 24) == {"OMP_NUM_THREADS": "4"}
    assert Placement(ranks=4, jobs=3).environment((), 8) == {"OMP_NUM_THREADS": "1"}


def test_the_gap_closed_is_a_fraction_of_the_distance_from_uniform_to_dense():
    labels_C = np.array([10.0, 30.0])
    found = {
        UNIFORM: (np.array([30.0, 90.0]), 7.0),
        "other": (np.array([29.0, 86.0]), 8.0),  # 5 of the 20 nats
        DENSE: (np.array([25.0, 75.0]), 9.0),
    }
    by_name = {outcome.name: outcome for outcome in comparisons(found, labels_C)}
    assert {name: outcome.gap_closed for name, outcome in by_name.items()} == {UNIFORM: 0.0, "other": 0.25, DENSE: 1.0}
    assert by_name["other"].against_uniform == pytest.approx(-5 / 40)
    assert by_name["other"].loss == pytest.approx(115 / 40)


def test_no_fraction_of_a_gap_is_given_where_the_gap_may_be_0():
    labels_C = np.full(4, 10.0)
    found = {
        UNIFORM: (np.full(4, 30.0), 7.0),
        "other": (np.full(4, 28.0), 8.0),
        DENSE: (np.array([20.0, 39.0, 20.0, 39.0]), 9.0),  # better by 2 nats together, between -9 and +10 per document
    }
    compared = comparisons(found, labels_C)
    assert compared[2].against_uniform < 0.0 < compared[2].interval[1]
    assert [outcome.gap_closed for outcome in compared] == [None] * 3
    assert [row[-1] for row in comparison_rows([asdict(one) for one in compared])] == [NO_GAP] * 3


def test_an_interval_of_95_percent_leaves_a_fortieth_on_either_side():
    sums_XC, labels_C = np.arange(50.0)[None], np.ones(50)
    low, high = bootstrap_intervals(sums_XC, labels_C, draws=4000)
    # Mean 24.5; the standard error of 50 documents is 14.43 / sqrt(50) = 2.041, and 1.96 of it on either side.
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * 2.041, rel=0.06)
