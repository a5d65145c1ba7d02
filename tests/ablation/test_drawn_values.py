"""Values that the figures of grids and laws draw, and random plans, against values written out by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qsparse_moe.ablation.allocation.allocate import uniform_at
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.rivals import random_plan
from qsparse_moe.ablation.cells import cells_of, sparsity_of
from qsparse_moe.ablation.grid.figures import _complete_map, _levels, iso_loss, loss_by_parameters
from qsparse_moe.ablation.grid.report import _cost
from qsparse_moe.ablation.grid.variants import variant_results
from qsparse_moe.ablation.law.figures import _middle_share, _percent
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config
from tests.ablation.test_figures import row
from tests.ablation.test_results import outcome, two_variants

LOSS = {(2, 0.0): 3.0, (2, 0.5): 3.5, (2, 0.75): 3.75, (4, 0.0): 2.0, (4, 0.5): 2.25, (4, 0.75): 2.875}


def variants():
    return variant_results(
        [
            row(
                {"model.moe.num_experts": 2 * ratio, "model.sparsity.default": sparsity},
                loss,
                num_experts=2 * ratio,
                sparsity=sparsity,
                kept_parameters=(ratio + 1) * 1000.0 * (1 - sparsity),
            )
            for (ratio, sparsity), loss in LOSS.items()
        ]
    )


def test_the_map_of_equal_loss_has_a_row_per_ratio_of_experts_and_a_column_per_s():
    ratios, sparsities, losses = _complete_map(variants()[::-1])
    assert (ratios, sparsities) == ([2.0, 4.0], [0.0, 0.5, 0.75])
    assert losses == [[3.0, 3.5, 3.75], [2.0, 2.25, 2.875]]
    assert _complete_map(variants()[1:]) is None, "a missing pair leaves a hole"
    assert _complete_map([*variants(), variants()[0]]) is None, "two variants at one pair"


def test_the_map_of_equal_loss_has_s_on_the_x_axis_a_dot_per_variant_and_ten_levels_up_to_the_largest_loss():
    figure = iso_loss(variants())
    axis = figure.axes[0]
    (dots,) = axis.lines
    assert set(zip(*dots.get_data(), strict=True)) == {(sparsity, ratio) for ratio, sparsity in LOSS}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["2", "4"]
    levels = _levels(list(LOSS.values()))
    assert levels == pytest.approx(np.linspace(2.0, 3.75, 11))


def test_the_loss_over_parameters_is_in_thousands_with_the_front_as_steps():
    figure = loss_by_parameters(variants())
    axis = figure.axes[0]
    assert axis.get_xlabel() == "thousand needed parameters"
    drawn = {tuple(point) for point in axis.collections[0].get_offsets().tolist()}
    assert drawn == {((ratio + 1) * (1 - sparsity), loss) for (ratio, sparsity), loss in LOSS.items()}
    (front,) = axis.lines
    assert list(zip(*front.get_data(), strict=True)) == [(0.75, 3.75), (1.25, 2.875), (2.5, 2.25), (5.0, 2.0)]
    assert axis.collections[0].get_array().tolist() == [sparsity for _, sparsity in LOSS]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_plan_differs_from_a_common_level_by_up_to_three_tenths_and_meets_the_budget(seed):
    load = {0: (0.5,) * 4, 1: (0.5,) * 4}
    costs = Costs(config(), load, "sparsity", context=10, batch=3)
    uniform = uniform_at(SparsityPlan.uniform(config(), 0.0), costs, 0.5)
    plan = random_plan(uniform, costs, 0.5, seed)
    assert costs.of(plan) == pytest.approx(0.5, abs=0.02) and costs.of(plan) >= 0.5 - 1e-9
    values = np.array([sparsity_of(plan, cell) for cell in cells_of(plan)])
    # 24 numbers from an interval of 0.6 cover most of it; a budget of 0.5 keeps all of them away from the clipping.
    assert 0.4 < np.ptp(values) <= 0.6 and values.std() == pytest.approx(0.6 / 12**0.5, rel=0.35)
    assert len({*values.tolist()}) == len(values)
    assert plan != random_plan(uniform, costs, 0.5, seed + 1) and plan == random_plan(uniform, costs, 0.5, seed)


def test_changes_of_the_reducible_loss_are_percentages_of_the_dense_model():
    assert _percent(np.array([2.0, 1.5, 3.0])).tolist() == [0.0, -25.0, 50.0]


def test_the_curve_over_s_is_drawn_at_the_median_of_the_different_shares_of_experts():
    runs = SimpleNamespace(expert_share=np.array([0.5, 0.5, 0.5, 0.25, 0.0625]))
    assert _middle_share(runs) == 0.25


def test_the_cost_table_has_means_over_the_runs_of_a_variant_and_their_median_speed(tmp_path):
    grid = two_variants(tmp_path)
    measured = [(40.0, 1.0), (50.0, None), (90.0, 6.0), (60.0, 2.0)]
    results = [
        replace(outcome("dense", seed, 2.0), kept_parameters=needed, tokens_per_second=speed)
        for seed, (needed, speed) in enumerate(measured)
    ]
    *_, cost = _cost(grid, [*results, outcome("half", 0, 2.0)])
    assert cost.splitlines()[2:] == ["| dense | 60 | 2 |", "| half | 50 | 10 |"]
