"""What is measured and written of other ranks of choice, and of whole plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qsparse_moe.ablation.routing import Choice, RoutingCell, routing_choices, with_choices
from qsparse_moe.ablation.sensitivity.documents import loss_by_document
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.ablation.sensitivity.figures import sensitivity_drawings, write_figures
from qsparse_moe.ablation.sensitivity.measure import Sensitivity
from qsparse_moe.ablation.sensitivity.report import as_dict, markdown, plans_line, routing_rows
from qsparse_moe.ablation.sensitivity.routing_changes import plan_agreement, routing_changes
from qsparse_moe.ablation.sensitivity.stored import stored
from tests.ablation.small_models import config, model_of, rows_of


@pytest.fixture(scope="module")
def measured():
    """Return a model with fewer experts in one layer, its sequences, and its routing changes, estimated and exact."""
    model, rows = model_of(config({"experts_per_token": 3}, default=0.25)), rows_of()
    model.set_sparsity(with_choices(model.sparsity_plan, {0: Choice(2), 1: Choice(3)}))
    found = estimate(model, rows, (0.25,), draws=50)
    base_C = loss_by_document(model, rows)
    return model, rows, routing_changes(model, rows, found, base_C, exact=True, draws=50)


def test_the_exact_change_of_a_number_of_experts_is_that_of_the_plan_with_it(measured):
    model, rows, changes = measured
    plan, labels = model.sparsity_plan, rows.labels_C.sum()
    base = loss_by_document(model, rows).sum()
    assert {change.cell.layer for change in changes} == {0, 1}
    for change in changes:
        if change.cell.choice.skipped is None:
            model.set_sparsity(
                with_choices(plan, {0: Choice(2), 1: Choice(3)} | {change.cell.layer: change.cell.choice})
            )
            wanted = (loss_by_document(model, rows).sum() - base) / labels
            assert change.exact == pytest.approx(wanted, abs=1e-12), change.cell.name
            model.set_sparsity(plan)
    alone = [change.cell.choice for change in changes if change.cell.choice.skipped is not None]
    assert alone == [Choice(2, skipped=0), Choice(3, skipped=0), Choice(3, skipped=1)]
    assert len({change.exact for change in changes}) == len(changes)
    assert all(change.exact_interval[0] <= change.exact <= change.exact_interval[1] for change in changes)


def test_whole_plans_are_evaluated_as_the_model_runs_them_and_ranked_by_their_estimate(measured):
    model, rows, _ = measured
    plan = model.sparsity_plan
    found = plan_agreement(model, rows, routing_choices(model.config), 12)
    assert model.sparsity_plan is plan and len(found.estimated) == len(found.evaluated) == 12
    assert len(set(found.evaluated)) == 12 and np.isfinite(found.estimated).all()
    # The model is far from trained: its loss is no parabola along changes as large as these.
    assert found.spearman > 0.3 and found.with_routing.spearman > 0.3
    assert len(set(found.with_routing.estimated) - set(found.estimated)) == 12
    assert plan_agreement(model, rows, routing_choices(model.config), 3).evaluated == found.evaluated[:3]


def test_a_report_has_the_routing_and_the_whole_plans(measured, tmp_path):
    model, rows, changes = measured
    plans = plan_agreement(model, rows, routing_choices(model.config), 4)
    found = Sensitivity(model.sparsity_plan, 3, 5, 1.5, (), 0.5, None, 0, (), changes, plans)
    report = as_dict(found, run_dir=tmp_path, step=7)
    first = report["routing"][0]
    assert (first["layer"], first["change"], first["experts_per_token"], first["skipped_rank"]) == (0, "A 0", 0, None)
    assert first["exact"] == changes[0].exact and first["estimate_low"] == changes[0].estimate_interval[0]
    assert report["plans"]["spearman"] == plans.spearman and len(report["plans"]["evaluated"]) == 4
    kept = stored({**report, "points": [], "agreement": []}).plans
    assert kept == plans
    earlier = {name: value for name, value in report["plans"].items() if name != "with_routing"}
    assert stored({**report, "points": [], "agreement": [], "plans": earlier}).plans.with_routing is None
    line = plans_line(plans)
    assert f"Spearman {plans.with_routing.spearman:.3f}" in line and line in markdown(found, title="A report")
    assert plans_line(replace(plans, with_routing=None)) == (
        f"4 random plans of both sparsities, estimated as a whole and evaluated: Spearman {plans.spearman:.3f}, "
        f"Pearson {plans.pearson:.3f}."
    )
    assert [row[:2] for row in routing_rows(found)][:4] == [
        ("0", "A 0"),
        ("0", "A 1"),
        ("0", "A 3"),
        ("0", "without rank 0"),
    ]
    text = markdown(found, title="A report")
    assert "Other ranks of choice in one layer:" in text and "| 1 | without rank 1 |" in text
    assert (
        f"4 random plans of both sparsities, estimated as a whole and evaluated: Spearman {plans.spearman:.3f}" in text
    )
    files = write_figures(sensitivity_drawings(found), tmp_path)
    assert [file.name for file in files] == ["routing.png", "plans.png"]
    assert (tmp_path / "routing.png").read_bytes()[:4] == b"\x89PNG"


def test_names_of_choices():
    assert [choice.name for choice in (Choice(1), Choice(2, 0.7), Choice(2, skipped=1))] == [
        "A 1",
        "A 2, top-p 0.7",
        "without rank 1",
    ]
    assert RoutingCell(3, Choice(0)).name == "layer 3, A 0"
