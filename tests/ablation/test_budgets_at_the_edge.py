"""Plans for budgets near the largest S that a plan may have."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qsparse_moe.ablation.allocation.allocate import MOST_SPARSE, shifted
from qsparse_moe.ablation.allocation.cost import Costs
from qsparse_moe.ablation.allocation.rivals import _greedy_layer
from qsparse_moe.ablation.cells import cells_of, sparsity_of
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config
from tests.ablation.test_allocate import EVEN, KnownLayer


def wide_config():
    wide = config(default=0.25)
    return wide.model_copy(update={"hidden_size": 20, "moe": wide.moe.model_copy(update={"expert_hidden_size": 20})})


def test_a_shifted_plan_reaches_the_sparsest_one_whatever_its_offsets():
    wide = wide_config()
    costs = Costs(wide, EVEN, "sparsity")
    plan = SparsityPlan.uniform(wide, 0.0)
    offsets = dict(zip(cells_of(plan), np.linspace(-0.3, 0.3, len(cells_of(plan))).tolist(), strict=True))
    sparsest = costs.of(SparsityPlan.uniform(wide, MOST_SPARSE))
    assert costs.of(shifted(plan, offsets, costs, sparsest)) == pytest.approx(sparsest)
    dense = shifted(plan, offsets, costs, 0.0)
    # The least shift that meets a budget of 0: no S is negative, and the plan is dense up to the rounding of K.
    assert all(0.0 <= sparsity_of(dense, cell) < 0.025 for cell in cells_of(dense))
    with pytest.raises(ConfigError, match=rf"an S of 0\.95 at every site is a mean S of {sparsest:.4f}; ask for --sp"):
        shifted(plan, offsets, costs, sparsest + 0.01)


def test_a_plan_that_meets_the_budget_without_zeros_is_found_where_zeros_take_longer():
    wide = wide_config()
    # A matrix of this size is read faster as a whole than by selected rows.
    times = SimpleNamespace(fixed=1.0, of_site=lambda config, layer, site, sparsity: 1.0 if sparsity == 0 else 2.0)
    costs = Costs(wide, EVEN, "ms", times=times)
    plan = SparsityPlan.uniform(wide, 0.0)
    found = shifted(plan, dict.fromkeys(cells_of(plan), 0.0), costs, costs.of(plan))
    assert {sparsity_of(found, cell) for cell in cells_of(plan)} == {0.0}
    with pytest.raises(ConfigError, match="cannot be met"):
        shifted(plan, dict.fromkeys(cells_of(plan), 0.0), costs, 0.9 * costs.of(plan))


def test_no_site_of_a_greedy_plan_goes_beyond_the_largest_s():
    wide = wide_config()
    costs = Costs(wide, EVEN, "parameters")
    factors = {"attention_input": 4.0, "attention_output": 1.0, "expert_input": 9.0, "expert_hidden": 5.0}
    found = _greedy_layer(KnownLayer(factors), [()], SparsityPlan.uniform(wide, 0.9), costs, list)
    levels = sorted(round(level, 6) for level in found.values())
    assert levels[-1] == MOST_SPARSE and levels[0] < 0.9, "some sites are at the end while others are not"
