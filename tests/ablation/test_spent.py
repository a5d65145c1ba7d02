"""Where a plan spends loss: the parts of the estimate, with the evaluated change of every layer's experts."""

from __future__ import annotations

import pytest

from qsparse_moe.ablation.allocation.spent import dense_terms, loss_spent
from qsparse_moe.ablation.routing import Choice, routing_choices, with_all_ranks, with_choices
from qsparse_moe.ablation.sensitivity import measured_routing
from qsparse_moe.ablation.sensitivity.documents import mean_loss
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config, model_of, rows_of


@pytest.fixture(scope="module")
def dense_model():
    """Return a model, its sequences, its dense plan, and the terms around that."""
    model, rows = model_of(config(default=0.0)), rows_of()
    dense = with_all_ranks(SparsityPlan.uniform(model.config, 0.0))
    return model, rows, dense, dense_terms(model, rows, dense, routing_choices(model.config))


@pytest.mark.parametrize("choice", [Choice(0), Choice(1), Choice(2, 0.6)], ids=lambda choice: choice.name)
def test_the_part_of_a_layer_whose_experts_alone_change_is_the_evaluated_change(dense_model, choice):
    model, rows, dense, terms = dense_model
    plan = with_choices(dense, {0: Choice(2), 1: choice})
    change = mean_loss(model, rows, plan) - mean_loss(model, rows, dense)
    found = loss_spent(terms, model, rows, plan, change)
    assert found.parts.routing == {0: 0.0, 1: pytest.approx(change, abs=1e-9)}
    assert found.parts.total == pytest.approx(found.evaluated, abs=1e-9) and not any(found.parts.cells.values())
    # The estimate alone is another number, so that the equality above holds by the evaluation.
    assert abs(terms.change(plan, {0: Choice(2), 1: choice}) - change) > 1e-7


def test_a_plan_takes_one_evaluation_per_layer_that_it_changes(dense_model, monkeypatch):
    model, rows, dense, terms = dense_model
    evaluated, before = [], model.sparsity_plan

    def counted(model, sequences, plan):
        evaluated.append(plan.experts_per_token)
        return mean_loss(model, sequences, plan)

    monkeypatch.setattr(measured_routing, "mean_loss", counted)
    loss_spent(terms, model, rows, with_choices(dense, {0: Choice(1), 1: Choice(0)}), 0.0)
    assert evaluated == [{}, {0: 1, 1: 2}, {0: 2, 1: 0}] and model.sparsity_plan is before
