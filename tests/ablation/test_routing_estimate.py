"""The estimates of other choices of ranks, and of whole plans, compared with differences of the loss and the logits."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of
from qsparse_moe.ablation.routing import Choice, RoutingCell, choice_weights, single_changes, used_ranks
from qsparse_moe.ablation.sensitivity.documents import loss_by_document, token_losses
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.ablation.sensitivity.joint import plan_terms
from qsparse_moe.ablation.sensitivity.routed_layer import routed_layers
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.nn.hooks import SiteHook
from qsparse_moe.nn.sparse_site import SparseSite
from tests.ablation.small_models import config, model_of, rows_of

WEIGHTS_TA = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.15, 0.05]], dtype=torch.float64)
CHOICES = (Choice(0), Choice(1), Choice(2), Choice(3), Choice(3, 0.75))


def three_ranks(**sparsity):
    return model_of(config({"experts_per_token": 3, "num_shared_experts": 1}, default=0.25, **sparsity))


@pytest.mark.parametrize(
    ("choice", "used"),
    [
        (Choice(0), [[0, 0, 0], [0, 0, 0]]),
        (Choice(2), [[1, 1, 0], [1, 1, 0]]),
        (Choice(3, 0.75), [[1, 1, 0], [1, 0, 0]]),
        (Choice(3, 0.81), [[1, 1, 1], [1, 1, 0]]),
        (Choice(1, 0.9), [[1, 0, 0], [1, 0, 0]]),
        (Choice(0, 0.9), [[0, 0, 0], [0, 0, 0]]),
        (Choice(3, 1.0, 1), [[1, 0, 1], [1, 0, 1]]),
    ],
)
def test_the_ranks_in_use_and_their_weights(choice, used):
    used_TA = torch.tensor(used, dtype=torch.bool)
    assert torch.equal(used_ranks(WEIGHTS_TA, choice), used_TA)
    kept_TA = WEIGHTS_TA * used_TA
    torch.testing.assert_close(choice_weights(WEIGHTS_TA, choice, renormalized=False), kept_TA)
    scaled_TA = choice_weights(2 * WEIGHTS_TA, choice, renormalized=True)
    wanted_TA = 2 * kept_TA / kept_TA.sum(-1, keepdim=True) if used_TA.any() else torch.zeros_like(kept_TA)
    torch.testing.assert_close(scaled_TA, wanted_TA)


def test_single_changes_are_all_other_numbers_and_each_rank_but_the_last_alone():
    assert single_changes(Choice(2), 3) == [Choice(0), Choice(1), Choice(3), Choice(2, skipped=0)]


def test_all_ranks_combined_are_the_layer_itself():
    model, rows = three_ranks(), rows_of()
    wanted_C = loss_by_document(model, rows)
    with routed_layers(model, {0: Choice(3), 1: Choice(3)}):
        np.testing.assert_allclose(loss_by_document(model, rows), wanted_C, rtol=1e-12)
    with routed_layers(model, {1: Choice(2)}):
        assert np.abs(loss_by_document(model, rows) - wanted_C).max() > 1e-3
    np.testing.assert_array_equal(loss_by_document(model, rows), wanted_C)


def test_both_orders_of_a_choice_are_those_of_a_small_step_towards_it():
    model, rows = three_ranks(), rows_of()
    (batch, _) = next(iter(rows))
    found = estimate(model, rows, (0.25,), ste_share=0.0, draws=200)
    wanted_cells = [RoutingCell(layer, choice) for layer in (0, 1) for choice in single_changes(Choice(3), 3)]
    assert list(found.first_routing) == wanted_cells

    def logits():
        with torch.no_grad():
            output = model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS)
        return output.logits_BSV

    probabilities_BSV, step, compared = logits().softmax(-1), 1e-4, 0
    for cell in wanted_cells:
        moved = []
        for sign in (1, -1):
            with _mixed(model, {cell.layer: cell.choice}, sign * step):
                moved.append(logits())
        losses = [float(token_losses(one, batch.targets_BS).sum()) for one in moved]
        first = (losses[0] - losses[1]) / (2 * step)
        assert found.first_routing[cell].sum() == pytest.approx(first, rel=1e-4, abs=1e-6), cell.name
        assert found.second_routing[cell].sum() == pytest.approx(
            _fisher(probabilities_BSV, moved, step), rel=0.3, abs=1e-6
        )
        compared += found.second_routing[cell].sum() > 1e-3
    assert compared > 5


def test_terms_of_a_plan_are_those_of_a_small_step_towards_it_with_all_interactions():
    # The base leaves ranks out in both layers, and the plan takes one of them back and leaves others out.
    model, rows = three_ranks(), rows_of()
    (batch, _) = next(iter(rows))
    base = {0: Choice(2), 1: Choice(3, 0.75)}
    there = {0: Choice(3), 1: Choice(1)}
    with _as_plan(base):
        terms = plan_terms(model, rows, (0.25, 0.5, 0.75), {0: CHOICES, 1: (*CHOICES,)}, draws=300, ste_share=0.0)
    plan = model.sparsity_plan
    changed = {cell: (0.25, 0.5, 0.75)[number % 3] for number, cell in enumerate(cells_of(plan))}
    # other code follows in the file
    assert changed and terms and there and batch and plan


def _fisher(probabilities_BSV, moved, step):
    """Return half of the Fisher information per squared step, from the logits on both sides."""
    dz_BSV = (moved[0] - moved[1]) / (2 * step)
    mean_BS1 = (probabilities_BSV * dz_BSV).sum(-1, keepdim=True)
    return 0.5 * float((probabilities_BSV * (dz_BSV - mean_BS1).square()).sum())


def _mixed(model, choices, step):
    """Combine the experts with the weights of all ranks, moved by ``step`` towards those of the choices."""
    stack = ExitStack()
    for layer in stack.enter_context(routed_layers(model, choices)).values():
        towards = layer.choice

        def combine(y_ND, weights_TA, routed, towards=towards):
            w_TA = weights_TA + step * (choice_weights(weights_TA, towards, renormalized=True) - weights_TA)
            return (y_ND[routed.row_TA] * w_TA[..., None]).sum(1)

        moe = next(b.moe for b in model.blocks() if b.moe is not None and b.moe.permutation is layer.permutation)
        moe.permutation = layer.permutation.__class__(layer.permutation.sort, layer.permutation.permute, combine)
    return stack
