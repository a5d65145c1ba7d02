"""The estimates of other choices of ranks, and of whole plans, compared with differences of the loss and the logits."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from qsparse_moe.ablation.allocation.cost import measured_load
from qsparse_moe.ablation.cells import cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.routing import (
    Choice,
    RoutingCell,
    choice_weights,
    single_changes,
    used_ranks,
    with_all_ranks,
    with_choices,
)
from qsparse_moe.ablation.sensitivity.documents import loss_by_document, token_losses
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.ablation.sensitivity.joint import interpolated, plan_terms
from qsparse_moe.ablation.sensitivity.measured_routing import with_measured_routing
from qsparse_moe.ablation.sensitivity.routed_layer import routed_layers
from qsparse_moe.config.shapes import EXPERT_SITES
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.moe.permutation import GATHERS, Permutation
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
    model, rows, values = three_ranks(), rows_of(), (0.25, 0.5, 0.75)
    (batch, _) = next(iter(rows))
    base, towards = {0: Choice(2), 1: Choice(3, 0.75)}, {0: Choice(3), 1: Choice(1)}
    model.set_sparsity(with_choices(model.sparsity_plan, base))
    plan = model.sparsity_plan
    terms = plan_terms(model, rows, values, dict.fromkeys((0, 1), CHOICES), draws=300, ste_share=0.0)
    assert model.sparsity_plan is plan and terms.change(plan, base) == pytest.approx(0.0, abs=1e-12)
    there = with_cells(plan, {cell: values[number % 3] for number, cell in enumerate(cells_of(plan))})
    model.set_sparsity(with_all_ranks(plan))
    step, moved = 1e-5, []
    with _Moved(model, base, towards, there) as direction, torch.no_grad():
        for direction.step in (step, -step, 0.0):
            output = model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS)
            moved.append(output.logits_BSV)
    losses = [float(token_losses(one, batch.targets_BS).sum()) for one in moved]
    labels = rows.labels_C.sum()
    first = (losses[0] - losses[1]) / (2 * step)
    assert replace(terms, share=0.0).change(there, towards) == pytest.approx(first / labels, rel=1e-4)
    second = _fisher(moved[2].softmax(-1), moved, step)
    found = (terms.change(there, towards) - replace(terms, share=0.0).change(there, towards)) * labels
    assert found == pytest.approx(second, rel=0.08)
    # The interactions are a part of it: the squares of the cells and choices alone add up to another number.
    assert second > 0.01 and abs(_alone(terms, there, towards) - second) > 0.15 * second


def test_the_parts_of_a_plan_add_up_and_every_interaction_is_divided_equally():
    model, rows, values = three_ranks(), rows_of(), (0.25, 0.5, 0.75)
    plan, towards = model.sparsity_plan, {0: Choice(1), 1: Choice(2)}
    terms = plan_terms(model, rows, values, dict.fromkeys((0, 1), CHOICES), draws=20)
    here = {0: Choice(3), 1: Choice(3)}
    first, second = cells_of(plan)[0], cells_of(plan)[-1]
    there = with_cells(plan, {cell: values[number % 3] for number, cell in enumerate(cells_of(plan))})
    parts = terms.parts(there, towards)
    assert set(parts.cells) == set(cells_of(plan)) and set(parts.routing) == {0, 1}
    assert parts.total == pytest.approx(terms.change(there, towards), rel=1e-9) and abs(parts.total) > 1e-3
    # One change alone is its whole part, and the excess of two over the sum of both is divided by two.
    alone = [terms.change(with_cells(plan, {cell: 0.75}), here) for cell in (first, second)]
    both = with_cells(plan, {first: 0.75, second: 0.75})
    excess = terms.change(both, here) - sum(alone)
    assert abs(excess) > 1e-6
    found = terms.parts(both, here)
    assert [found.cells[cell] for cell in (first, second)] == pytest.approx([one + excess / 2 for one in alone])
    assert all(part == 0 for cell, part in found.cells.items() if cell not in (first, second))
    one = terms.parts(plan, here | {1: Choice(1)})
    assert one.routing == {0: 0.0, 1: pytest.approx(terms.change(plan, here | {1: Choice(1)}))}


def test_the_load_under_every_choice_is_that_of_a_model_with_the_plan_of_the_choice():
    model, rows = three_ranks(), rows_of()
    plan = model.sparsity_plan
    terms = plan_terms(model, rows, (0.25, 0.5), dict.fromkeys((0, 1), CHOICES), draws=1)
    for choice in CHOICES:
        # Of the first layer, because the second one routes other tokens under another choice of the first.
        model.set_sparsity(with_choices(plan, {0: choice}))
        assert terms.load[0][choice] == pytest.approx(measured_load(model, rows)[0])


def test_around_a_plan_without_experts_their_cells_change_nothing_and_the_others_do():
    # In fp32, where a division by the weights of no rank at all would overflow.
    model, rows = model_of(config({"num_experts": 2, "experts_per_token": 2}, default=0.25)).float(), rows_of()
    model.set_sparsity(with_choices(model.sparsity_plan, {0: Choice(0), 1: Choice(0)}))
    found = estimate(model, rows, (0.75,))
    for cell in cells_of(model.sparsity_plan):
        assert np.any(found.total(cell)) == (cell.site not in EXPERT_SITES), cell.name


class _Moved:
    """Inside the context, the sites and the combination of every layer are moved by ``step`` towards another plan.

    The rows of a rank move with the weights of that plan, as in the terms.
    """

    def __init__(self, model, base, towards, there) -> None:
        self.step, self._model, self._stack = 0.0, model, ExitStack()
        self._base, self._towards, self._there = base, towards, there

    def __enter__(self):
        for block in self._model.blocks():
            moe, own = block.moe, {}
            for name, site in block.sites().items():
                site.hook = SiteHook(partial(self._towards_plan, block.layer, site, own), ranks=True)
                self._stack.callback(setattr, site, "hook", None)
                assert name in ("expert_input", "expert_hidden") or site.num_experts == 1
            self._patch(moe.experts, "forward", partial(self._twice, moe.experts.forward, moe, own))
            combine = partial(self._combine, block.layer, own)
            self._patch(moe, "permutation", Permutation(GATHERS.sort, GATHERS.permute, combine))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _patch(self, thing, name, value) -> None:
        before = vars(thing).get(name)
        self._stack.callback(lambda: delattr(thing, name) if before is None else setattr(thing, name, before))
        setattr(thing, name, value)

    def _towards_plan(self, layer, site, own, x, expert_ids_N, sparse):
        other = SparseSite(site.site, site.num_features, site.settings, select_rows_torch, num_experts=site.num_experts)
        other.set_sparsity(self._there.values[layer, site.site])
        moved = sparse + self.step * (other.select(x, expert_ids_N).sparse - sparse)
        if site.site == "expert_input":
            own["input"] = moved
            return sparse
        return moved

    def _twice(self, forward, moe, own, x_ND, counts, expert_N, **options):
        hook, moe.experts.hidden_site.hook = moe.experts.hidden_site.hook, None
        still, *stats = forward(x_ND, counts, expert_N, **options)
        moe.experts.hidden_site.hook = hook
        own["moved"] = forward(own["input"], counts, expert_N, **options)[0]
        return still, *stats

    def _combine(self, layer, own, y_ND, weights_TA, routed):
        now_TA, then_TA = (
            choice_weights(weights_TA, of[layer], renormalized=True)[..., None] for of in (self._base, self._towards)
        )
        still_TAD, moved_TAD = y_ND[routed.row_TA], own["moved"][routed.row_TA]
        return ((now_TA + self.step * (then_TA - now_TA)) * still_TAD + then_TA * (moved_TAD - still_TAD)).sum(1)


def _alone(terms, plan, choices) -> float:
    """Return the second order with the square of every cell and choice alone, summed over the labels."""
    total = 0.0
    for layer in terms.layers:
        which = layer.choices.index(choices[layer.cells[0].layer])
        sparsity_n = np.array([sparsity_of(plan, cell) for cell in layer.cells])
        total += np.square(layer.routing_drawn_OQ[which]).sum()
        total += np.square(interpolated(layer.drawn_OnQX[which], terms.values, sparsity_n)).sum()
    return float(terms.share * total)


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


def test_terms_with_measured_routing_give_the_evaluated_change_of_every_layer_alone_and_keep_the_interactions():
    model, rows = three_ranks(), rows_of()
    # Around a plan that leaves a rank out in one layer.
    plan = with_choices(model.sparsity_plan, {0: Choice(2), 1: Choice(3)})
    model.set_sparsity(plan)
    terms = plan_terms(model, rows, (0.25, 0.5), {0: CHOICES, 1: CHOICES})
    dense_C = loss_by_document(model, rows)
    model.set_sparsity(with_all_ranks(plan))
    measured = with_measured_routing(terms, model, rows)
    assert model.sparsity_plan == with_all_ranks(plan)
    alone, farthest = {}, 0.0
    for layer, choice in [(layer, choice) for layer in (0, 1) for choice in CHOICES]:
        choices = {0: Choice(2), 1: Choice(3)} | {layer: choice}
        there = with_choices(plan, choices)
        model.set_sparsity(there)
        wanted = float((loss_by_document(model, rows) - dense_C).sum() / rows.labels_C.sum())
        alone[layer, choice] = measured.change(there, choices)
        assert alone[layer, choice] == pytest.approx(wanted, abs=1e-9), choice.name
        farthest = max(farthest, abs(terms.change(there, choices) - wanted))
    assert farthest > 1e-4
    both = {0: Choice(0), 1: Choice(1)}
    drawn = [one.routing_drawn_OQ[one.choices.index(both[n])] for n, one in enumerate(terms.layers)]
    crossed = 2 * terms.share * float(drawn[0] @ drawn[1]) / terms.num_labels
    assert abs(crossed) > 1e-6
    found = measured.parts(with_choices(plan, both), both)
    assert found.total == pytest.approx(alone[0, Choice(0)] + alone[1, Choice(1)] + crossed, rel=1e-6)
    assert found.routing[0] == pytest.approx(alone[0, Choice(0)] + crossed / 2, rel=1e-6)
