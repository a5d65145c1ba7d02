"""The load of the experts over several batches and under the plan of a budget, and pooling where nothing is shared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qsparse_moe.ablation.allocation.allocate import uniform_at
from qsparse_moe.ablation.allocation.alternatives import pooled_selection
from qsparse_moe.ablation.allocation.compare import load_under_uniform
from qsparse_moe.ablation.allocation.cost import Costs, measured_load
from qsparse_moe.ablation.sensitivity.documents import loss_by_document
from tests.ablation.small_models import config, model_of, rows_of
from tests.ablation.test_allocate import EVEN


def test_the_load_is_that_of_all_batches_and_is_measured_again_under_the_plan_of_the_budget():
    model, rows = model_of(config(default=0.25)), rows_of(num_sequences=5)
    (whole,) = rows.batches
    parts = tuple(type(whole)(*(None if x is None else x[part] for x in whole)) for part in (slice(0, 2), slice(2, 5)))
    cut = replace(rows, batches=parts, documents=(rows.documents[0][:2], rows.documents[0][2:]))
    load = measured_load(model, rows)
    for layer, shares in measured_load(model, cut).items():
        assert shares == pytest.approx(load[layer])
    costs, before = Costs(model.config, EVEN, "sparsity"), model.sparsity_plan
    for rounds in (1, 2, 3):
        found = load_under_uniform(model, rows, costs, 0.7, rounds=rounds)
        assert found.load == load and model.sparsity_plan is before
        model.set_sparsity(uniform_at(before, found, 0.7))
        load = measured_load(model, rows)
        model.set_sparsity(before)
    assert load != measured_load(model, rows), "the plan of the budget sends tokens to other experts"


@pytest.mark.parametrize("rescale", ["none", "unit", "preserve"])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_pooling_over_a_single_expert_is_the_selection_of_the_site_itself(rescale, activations):
    quantization = {"activations": activations}
    model = model_of(config({"experts_per_token": 1}, default=0.5, rescale=rescale, quantization=quantization))
    rows = rows_of()
    own = loss_by_document(model, rows)
    with pooled_selection(model):
        pooled = loss_by_document(model, rows)
    assert pooled == pytest.approx(own, rel=1e-9)
