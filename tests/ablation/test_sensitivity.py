"""Sensitivities of single cells: the exact loss changes, and their agreement with the estimates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences
from qsparse_moe.ablation.sensitivity.measure import agreements, check_ranks, measure
from qsparse_moe.errors import ConfigError
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config, model_of, rows_of


def test_cells_name_every_s_of_a_plan_once():
    plan = SparsityPlan.uniform(config(), 0.5)
    cells = cells_of(plan)
    assert len(set(cells)) == len(cells) == 2 * (2 + 2 * 4)
    changed = with_cells(plan, {Cell(1, "expert_hidden", 2): 0.75, Cell(0, "attention_output", None): 0.25})
    assert [sparsity_of(changed, cell) for cell in cells if sparsity_of(changed, cell) != 0.5] == [0.25, 0.75]
    assert Cell(1, "expert_hidden", 2).name == "layer 1, expert_hidden, expert 2"
    assert Cell(0, "attention_output", None).name == "layer 0, attention_output"


@pytest.mark.parametrize("moe", [{}, {"num_shared_experts": 1, "num_dense_layers": 1}], ids=["experts", "all sites"])
def test_the_exact_change_is_the_difference_of_two_evaluations_and_the_model_keeps_its_plan(moe):
    model, rows = model_of(config(moe, default=0.25)), rows_of()
    plan = model.sparsity_plan
    found = measure(model, rows, (0.25, 0.75), draws=20)
    assert model.sparsity_plan is plan and found.evaluations == len(found.changes) + 1 == len(cells_of(plan)) + 1
    (batch, _) = next(iter(rows))
    for point in found.changes[:: 1 if moe else 3]:
        assert point.sparsity == 0.75
        model.set_sparsity(with_cells(plan, {point.cell: 0.75}))
        with torch.no_grad():
            loss = model(
                batch.tokens_BS,
                targets_BS=batch.targets_BS,
                positions_BS=batch.positions_BS,
                documents_BS=batch.documents_BS,
            )
        assert point.exact == pytest.approx(float(loss.losses["lm_loss"]) - found.loss, abs=1e-12), point.cell.name
        low, high = point.exact_interval
        assert low <= high


def test_an_expert_without_routed_tokens_changes_nothing():
    model, rows = model_of(config({"bias_update_rate": 0.001}, default=0.25)), rows_of()
    for block in model.blocks():
        block.moe.router.expert_bias[3] = -10.0
    found = measure(model, rows, (0.75,), draws=5)
    idle = [p for p in found.changes if p.cell.expert == 3]
    assert len(idle) == 4 and all(p.exact == 0.0 and p.estimate == 0.0 and p.exact_interval == (0.0, 0.0) for p in idle)
    assert any(p.exact != 0.0 for p in found.changes)


def test_agreement_is_computed_over_all_points_and_per_s():
    model, rows = model_of(config(default=0.25)), rows_of()
    found = measure(model, rows, (0.5, 0.75), draws=5)
    assert [one.sparsity for one in found.agreement] == [None, 0.5, 0.75]
    assert found.agreement[0].points == len(found.changes) == 2 * found.agreement[1].points
    assert all(-1 <= one.spearman <= 1 for one in found.agreement)
    assert found.times_cheaper == found.exact_seconds / found.estimate_seconds
    assert agreements(found.changes) == found.agreement
    for one in found.agreement:
        group = [p for p in found.changes if one.sparsity in (None, p.sparsity)]
        decided = [p for p in group if p.exact_interval[0] > 0 or p.exact_interval[1] < 0]
        assert one.decided == len(decided) and len(decided) > 2
        assert one.spearman_decided == spearmanr([p.estimate for p in decided], [p.exact for p in decided]).statistic
        assert one.spearman_halves == spearmanr(*zip(*(p.exact_halves for p in group), strict=True)).statistic
    only = measure(model, rows, (0.5,), exact=False, draws=5)
    assert only.agreement == () and only.times_cheaper is None and {p.exact for p in only.changes} == {None}


def test_halves_take_every_other_document_and_a_single_document_has_none():
    model, rows = model_of(config(default=0.25)), rows_of()
    found = measure(model, rows, (0.75,), draws=5)
    labels_C = rows.labels_C
    weights = np.array([labels_C[0::2].sum(), labels_C[1::2].sum()]) / labels_C.sum()
    for point in found.changes:
        assert weights @ point.exact_halves == pytest.approx(point.exact, abs=1e-12)
    assert len({point.exact_halves for point in found.changes}) > 3
    one = DocumentSequences(rows.batches, tuple(torch.zeros_like(ids) for ids in rows.documents), 1)
    assert measure(model, one, (0.75,), draws=5).agreement[0].spearman_halves is None


@pytest.mark.parametrize(
    ("moe", "sparsity", "message"),
    [
        ({}, {"selection": "relu", "default": 0.5}, r"model\.sparsity\.selection \(relu\) must be topk or block"),
        ({"router_input": "sparse"}, {"default": 0.5}, r"model\.moe\.router_input \(sparse\) must be dense"),
    ],
)
def test_selections_without_a_k_per_expert_are_refused(moe, sparsity, message):
    with pytest.raises(ConfigError, match=message):
        check_ranks(config(moe, **sparsity))
