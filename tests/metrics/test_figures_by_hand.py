"""The table of a plan and the moments of a histogram, written out by hand."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.metrics.histograms import histogram_summary
from qsparse_moe.metrics.tensorboard import plan_table
from qsparse_moe.sparsity.log_counts import LogBins
from qsparse_moe.sparsity.plan import SparsityPlan


def test_table_of_a_plan_shows_the_range_over_experts_in_any_order():
    plan = SparsityPlan({(0, "expert_hidden"): (0.5, 0.9, 0.25, 0.6), (1, "expert_hidden"): (0.5,) * 4})
    assert plan_table(plan).splitlines()[2:] == ["| 0 | 0.25 to 0.9 |", "| 1 | 0.5 |"]


def test_a_site_that_a_layer_lacks_is_a_dash_and_layers_are_in_order():
    plan = SparsityPlan(
        {(2, "expert_hidden"): (0.12345, 0.5), (0, "dense_hidden"): (0.75,), (0, "expert_hidden"): (0.0, 0.0)}
    )
    assert plan_table(plan) == (
        "| layer | expert_hidden | dense_hidden |\n"
        "| --- | --- | --- |\n"
        "| 0 | 0 | 0.75 |\n"
        "| 2 | 0.123 to 0.5 | \N{EN DASH} |"
    )


def test_moments_of_a_histogram_use_the_middles_of_its_bins():
    bins = LogBins(-3, 3, 1)
    counts = torch.zeros(len(bins.edges) - 1)
    counts[1], counts[3] = 4, 1  # the first bin and the last two are empty
    middles = [(bins.edges[i] + bins.edges[i + 1]) / 2 for i in (1, 3)]
    found = histogram_summary("h", counts, bins).value[0].histo
    assert (found.num, found.min, found.max) == (5, -2, 1) and list(found.bucket) == [4, 0, 1]
    assert found.sum == pytest.approx(4 * middles[0] + middles[1])
    assert found.sum_squares == pytest.approx(4 * middles[0] ** 2 + middles[1] ** 2)


def test_the_table_of_a_plan_has_the_experts_per_token_of_the_layers_that_set_them():
    plan = SparsityPlan({(0, "expert_hidden"): (0.25, 0.9), (1, "expert_hidden"): (0.5,)})
    lines = plan_table(plan.with_experts({1: 0}).with_top_p({0: 0.75})).splitlines()
    assert lines[0] == "| layer | expert_hidden | experts_per_token | top_p |"
    assert lines[2:] == ["| 0 | 0.25 to 0.9 | – | 0.75 |", "| 1 | 0.5 | 0 | – |"]
