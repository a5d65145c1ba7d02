"""The estimates of sensitivities from gradients, compared with derivatives by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsparse_moe.ablation.cells import Cell, cells_of
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, token_losses
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.ablation.sensitivity.row_changes import row_changes
from qsparse_moe.data.batch import make_batch
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.model.transformer import IGNORED_LABEL
from qsparse_moe.nn.hooks import SiteHook
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import site_num_selected
from tests.ablation.small_models import config, model_of, rows_of

RESCALES = ["none", "unit", "preserve"]


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("selection", ["topk", "block"])
def test_changes_of_tokens_are_the_gradient_times_the_change_of_the_output_of_the_site(selection, rescale):
    settings = config(selection=selection, group_size=4, rescale=rescale, quantization={"activations": "int8"}).sparsity
    site = SparseSite("attention_input", 16, settings, select_rows_torch)
    site.set_sparsity([0.25])
    x_ND, grad_ND = torch.randn(7, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    x_ND[0, :5] = x_ND[0, 5]  # ties
    values = (0.0, 0.25, 0.5, 0.75)
    now_ND = site.select(x_ND).sparse
    found_NX = row_changes(site, x_ND, now_ND, grad_ND, [site_num_selected(settings, value, 16) for value in values])
    for place, value in enumerate(values):
        site.set_sparsity([value])
        wanted_N = (grad_ND * (site.select(x_ND).sparse - now_ND)).sum(-1)
        torch.testing.assert_close(found_NX[:, place], wanted_N, atol=1e-10, rtol=1e-10)


def test_first_order_is_the_derivative_along_the_change_for_every_cell():
    # From y towards y(S) by a small step: what the loss changes by, over the step, is g.(y(S) - y).
    model, rows = model_of(config({"num_shared_experts": 1}, default=0.25)), rows_of()
    plan, (batch, _) = model.sparsity_plan, next(iter(rows))
    found = estimate(model, rows, (0.75,), ste_share=0.0)
    step = 1e-5

    def loss() -> float:
        with torch.no_grad():
            output = model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS)
        return float(token_losses(output.logits_BSV, batch.targets_BS).sum())

    for block in model.blocks():
        for name, site in block.sites().items():
            for expert in range(site.num_experts):
                cell = Cell(block.layer, name, expert if name in ("expert_input", "expert_hidden") else None)
                losses = []
                for sign in (1, -1):
                    site.hook = SiteHook(_towards(site, 0.75, expert, sign * step), ranks=True)
                    losses.append(loss())
                    site.hook = None
                wanted = (losses[0] - losses[1]) / (2 * step)
                assert found.first[cell].sum() == pytest.approx(wanted, rel=1e-4, abs=1e-7), cell.name
                assert (found.second[cell] >= 0).all()
    assert model.sparsity_plan is plan and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training and all(site.ste_share == 1.0 for b in model.blocks() for site in b.sites().values())


def test_second_order_is_half_of_the_fisher_information_along_the_change_for_every_cell():
    # If the logits z change by dz, the Fisher information per label is Var(dz) under the model's prediction.
    model, rows = model_of(config({"num_shared_experts": 1}, default=0.25)), rows_of()
    (batch, _) = next(iter(rows))
    found = estimate(model, rows, (0.75,), ste_share=0.0, draws=200)
    step = 1e-4

    def logits():
        with torch.no_grad():
            output = model(batch.tokens_BS, positions_BS=batch.positions_BS, documents_BS=batch.documents_BS)
        return output.logits_BSV

    probabilities_BSV, compared = logits().softmax(-1), 0
    for block in model.blocks():
        for name, site in block.sites().items():
            for expert in range(site.num_experts):
                cell = Cell(block.layer, name, expert if name in ("expert_input", "expert_hidden") else None)
                moved = []
                for sign in (1, -1):
                    site.hook = SiteHook(_towards(site, 0.75, expert, sign * step), ranks=True)
                    moved.append(logits())
                    site.hook = None
                dz_BSV = (moved[0] - moved[1]) / (2 * step)
                mean_BS1 = (probabilities_BSV * dz_BSV).sum(-1, keepdim=True)
                wanted = 0.5 * float((probabilities_BSV * (dz_BSV - mean_BS1).square()).sum())
                assert found.second[cell].sum() == pytest.approx(wanted, rel=0.3, abs=1e-6), cell.name
                compared += wanted > 1e-3
    assert compared > 5


def test_the_estimate_of_a_document_is_that_of_its_sequence_alone():
    model, rows = model_of(config({"num_shared_experts": 1}, default=0.25)), rows_of()
    (batch, documents_BS) = next(iter(rows))
    whole = estimate(model, rows, (0.5, 0.75))
    tokens_RS = torch.cat([batch.tokens_BS, batch.targets_BS[:, -1:]], 1).numpy()
    for row, ids in enumerate(documents_BS):
        own = ids.unique().numpy()
        alone = make_batch(tokens_RS[row : row + 1], document_token=0, attend_across_documents=False)
        found = estimate(model, DocumentSequences((alone,), (ids[None] - int(own[0]),), len(own)), (0.5, 0.75), draws=0)
        for cell in cells_of(model.sparsity_plan):
            np.testing.assert_allclose(found.first[cell], whole.first[cell][:, own], atol=1e-10, err_msg=cell.name)
            assert not found.second[cell].any()


def test_positions_without_a_label_have_no_part_in_either_order():
    model, rows = model_of(config(default=0.25)), rows_of()
    (batch, documents_BS) = next(iter(rows))
    ignored = batch._replace(targets_BS=batch.targets_BS.clone())
    ignored.targets_BS[1:] = IGNORED_LABEL
    found = estimate(model, DocumentSequences((ignored,), (documents_BS,), rows.num_documents), (0.75,))
    first_row = documents_BS[0].unique()
    others = torch.ones(rows.num_documents, dtype=torch.bool).index_fill(0, first_row, False).numpy()
    assert others.any() and any(found.second[cell][:, first_row].any() for cell in found.second)
    for cell in cells_of(model.sparsity_plan):
        assert not found.first[cell][:, others].any() and not found.second[cell][:, others].any(), cell.name


def test_draws_of_labels_depend_on_the_seed_and_do_not_change_the_first_order():
    model, rows = model_of(config(default=0.25)), rows_of()
    one, same, other = (estimate(model, rows, (0.75,), seed=seed) for seed in (0, 0, 1))
    cells = cells_of(model.sparsity_plan)
    assert all(np.array_equal(one.total(cell), same.total(cell)) for cell in cells)
    assert all(np.array_equal(one.first[cell], other.first[cell]) for cell in cells)
    assert any(not np.array_equal(one.second[cell], other.second[cell]) for cell in cells)


def _towards(site: SparseSite, sparsity: float, expert: int, step: float):
    other = SparseSite(site.site, site.num_features, site.settings, select_rows_torch)
    other.set_sparsity([sparsity])

    def observe(x, expert_ids_N, sparse):
        moved = sparse + step * (other.select(x).sparse - sparse)
        return moved if expert_ids_N is None else torch.where((expert_ids_N == expert)[:, None], moved, sparse)

    return observe


def test_the_current_s_is_estimated_to_change_nothing():
    model, rows = model_of(config(default=0.5)), rows_of()
    found = estimate(model, rows, (0.5,))
    for cell in cells_of(model.sparsity_plan):
        assert np.abs(found.total(cell)).max() < 1e-9, cell.name


def test_sequences_of_one_document_are_squared_separately_and_added():
    model, rows = model_of(config(default=0.25)), rows_of(num_sequences=2)
    apart = DocumentSequences(rows.batches, (torch.arange(2)[:, None].expand_as(rows.documents[0]),), 2)
    together = DocumentSequences(rows.batches, (torch.zeros_like(rows.documents[0]),), 1)
    two, one = estimate(model, apart, (0.75,)), estimate(model, together, (0.75,))
    for cell in cells_of(model.sparsity_plan):
        np.testing.assert_allclose(one.second[cell][:, 0], two.second[cell].sum(1), rtol=1e-9, err_msg=cell.name)
        np.testing.assert_allclose(one.first[cell][:, 0], two.first[cell].sum(1), atol=1e-9, err_msg=cell.name)
    assert sum((two.second[cell] > 0).all() for cell in two.second) > 10
