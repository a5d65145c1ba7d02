"""Sensitivities of single cells: evaluation against evaluation by hand, estimate against what can be worked out."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from qsparse_moe.ablation.cells import Cell, cells_of, sparsity_of, with_cells
from qsparse_moe.ablation.sensitivity.documents import (
    DocumentSequences,
    bootstrap_intervals,
    token_losses,
    training_documents,
    validation_documents,
)
from qsparse_moe.ablation.sensitivity.estimate import estimate, row_changes
from qsparse_moe.ablation.sensitivity.figures import _figures
from qsparse_moe.ablation.sensitivity.measure import CellChange, agreements, check_ranks, measure
from qsparse_moe.ablation.sensitivity.report import costliest_rows
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.data.batch import make_batch
from qsparse_moe.data.rows import RowTable, evenly_spaced_rows
from qsparse_moe.errors import ConfigError
from qsparse_moe.kernels.topk_select.op import select_rows_torch
from qsparse_moe.model.transformer import build_model
from qsparse_moe.nn.hooks import SiteHook
from qsparse_moe.nn.sparse_site import SparseSite
from qsparse_moe.sparsity.plan import SparsityPlan, site_num_kept

VOCABULARY = 31


def config(moe=None, **sparsity) -> ModelConfig:
    settings = {"num_experts": 4, "expert_hidden_size": 16, "backend": "loop"} | (moe or {})
    return ModelConfig.model_validate(
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": VOCABULARY,
            "moe": settings,
            "sparsity": {"backend": "torch"} | sparsity,
        }
    )


def model_of(settings: ModelConfig, *, sharpness: float = 4.0):
    model = build_model(settings, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so that the loss depends on the layers at all
                parameter.mul_(sharpness)
    return model.eval()


def rows_of(num_sequences=3, length=10, seed=0) -> DocumentSequences:
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, (num_sequences, length + 1))
    tokens[:, 0] = tokens[1, 4] = 0
    batch = make_batch(tokens, document_token=0, attend_across_documents=False)
    documents = torch.cumsum((batch.tokens_BS == 0).flatten().long(), 0).view_as(batch.tokens_BS) - 1
    return DocumentSequences((batch,), (documents,), int(documents.max()) + 1)


def test_cells_name_every_s_of_a_plan_once():
    plan = SparsityPlan.uniform(config(), 0.5)
    cells = cells_of(plan)
    assert len(set(cells)) == len(cells) == 2 * (2 + 2 * 4)
    changed = with_cells(plan, {Cell(1, "expert_hidden", 2): 0.75, Cell(0, "attention_output", None): 0.25})
    assert [sparsity_of(changed, cell) for cell in cells if sparsity_of(changed, cell) != 0.5] == [0.25, 0.75]
    assert Cell(1, "expert_hidden", 2).name == "layer 1, expert_hidden, expert 2"
    assert Cell(0, "attention_output", None).name == "layer 0, attention_output"


@pytest.mark.parametrize("moe", [{}, {"num_shared_experts": 1, "num_dense_layers": 1}], ids=["experts", "all sites"])
def test_exact_is_the_difference_of_two_evaluations_and_the_model_keeps_its_plan(moe):
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


RESCALES = ["none", "unit", "preserve"]


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("selection", ["topk", "block"])
def test_changes_of_rows_are_gradient_times_what_the_site_itself_would_make(selection, rescale):
    settings = config(selection=selection, group_size=4, rescale=rescale, quantization={"activations": "int8"}).sparsity
    site = SparseSite("attention_input", 16, settings, select_rows_torch)
    site.set_sparsity([0.25])
    x_ND, grad_ND = torch.randn(7, 16, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    x_ND[0, :5] = x_ND[0, 5]  # ties
    values = (0.0, 0.25, 0.5, 0.75)
    now_ND = site.select(x_ND).sparse
    found_NX = row_changes(site, x_ND, now_ND, grad_ND, [site_num_kept(settings, value, 16) for value in values])
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
    # Of logits z that move by dz along the change, a label tells Var(dz) under the model's prediction.
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


def test_a_documents_part_of_an_estimate_is_that_of_its_row_alone():
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


def test_draws_of_labels_are_those_of_their_seed_and_change_no_first_order():
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


def test_the_s_of_the_moment_is_estimated_to_change_nothing():
    model, rows = model_of(config(default=0.5)), rows_of()
    found = estimate(model, rows, (0.5,))
    for cell in cells_of(model.sparsity_plan):
        assert np.abs(found.total(cell)).max() < 1e-9, cell.name


def test_an_expert_without_rows_changes_nothing():
    model, rows = model_of(config({"bias_update_rate": 0.001}, default=0.25)), rows_of()
    for block in model.blocks():
        block.moe.router.expert_bias[3] = -10.0
    found = measure(model, rows, (0.75,), draws=5)
    idle = [p for p in found.changes if p.cell.expert == 3]
    assert len(idle) == 4 and all(p.exact == 0.0 and p.estimate == 0.0 and p.exact_interval == (0.0, 0.0) for p in idle)
    assert any(p.exact != 0.0 for p in found.changes)


def data_of(tokens, evaluated=range(0, 12, 2)):
    """What the two kinds of rows are taken from; validation rows are ``evaluated``, in general every other of 12."""

    class Side:
        chunks, num_bytes, byte_counts = [tokens], np.full(len(tokens), 4), np.zeros(256)

        def __len__(self):
            return len(tokens)

    table = RowTable([Side()], [1], document_token=0, attend_across_documents=False)

    class Data:
        train = validation = table

        def evaluation_rows(self, num_rows):
            return table, np.array(evaluated)[:num_rows]

        def batch(self, rows):
            return table.batch(rows)

        def open_stream(self, **_):
            return None

    return Data()


def test_documents_of_validation_rows_are_counted_through_the_whole_table_and_those_of_training_rows_by_row():
    tokens = np.arange(1, 61).reshape(12, 5)
    for row, column in ((0, 0), (1, 2), (4, 0), (6, 3), (8, 1)):
        tokens[row, column] = 0
    data = data_of(tokens)
    rows = validation_documents(data, num_sequences=6, batch_size=4)
    # Row 2 belongs to the document that row 1 began, and row 10 to the one of row 8.
    assert torch.cat(rows.documents).tolist() == [[0] * 4, [1] * 4, [2] * 4, [2, 2, 2, 3], [3, 4, 4, 4], [4] * 4]
    assert rows.labels_C.tolist() == [4, 4, 7, 2, 7] and [len(ids) for ids in rows.documents] == [4, 2]
    assert torch.cat([batch.tokens_BS for batch in rows.batches]).tolist() == tokens[::2, :-1].tolist()
    trained = training_documents(RunConfig(), data, num_sequences=6, batch_size=4)
    read = torch.cat([batch.tokens_BS for batch in trained.batches])
    assert read.tolist() == tokens[evenly_spaced_rows(6, 12), :-1].tolist()
    ids = torch.cat(trained.documents)
    assert trained.num_documents == int(ids.max()) + 1 == 6 + int((read[:, 1:] == 0).sum())
    for one, other in itertools.pairwise(ids):
        assert other[0] == one[-1] + 1, "every row begins another document"
    assert ((ids[:, 1:] != ids[:, :-1]) == (read[:, 1:] == 0)).all()


def test_documents_are_counted_through_tables_of_more_rows_than_are_read_at_once():
    tokens = np.random.default_rng(0).integers(0, 9, (2600, 5))
    tokens[1024, 0] = tokens[2047, 3] = 0
    tokens[1023], tokens[2048] = 5, 5  # the rows at the borders, where a document goes on from one part to the next
    wanted = [1, 1022, 1023, 1024, 1025, 2047, 2048, 2049, 2599]
    rows = validation_documents(data_of(tokens, wanted), num_sequences=9, batch_size=4)
    number, of_label = 0, []
    for row in tokens[:, :-1].tolist():
        of_label.append([])
        for token in row:
            number += token == 0
            of_label[-1].append(number)
    met = sorted({number for row in wanted for number in of_label[row]})
    expected = [[met.index(number) for number in of_label[row]] for row in wanted]
    assert torch.cat(rows.documents).tolist() == expected and rows.num_documents == len(met)


def test_bootstrap_covers_the_mean_as_often_as_it_says_and_knows_a_constant():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        labels_C = generator.integers(5, 50, 40).astype(float)
        sums_XC = (labels_C * generator.normal(0.3, 1.0, 40))[None]
        low, high = bootstrap_intervals(sums_XC, labels_C, draws=300, seed=trial)
        hits += low[0] <= 0.3 <= high[0]
    assert 0.86 <= hits / 200 <= 0.99
    low, high = bootstrap_intervals(0.5 * labels_C[None], labels_C, draws=50)
    assert low[0] == pytest.approx(0.5) and high[0] == pytest.approx(0.5)


def test_agreement_is_of_all_points_and_of_each_s():
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


def test_halves_are_of_every_other_document_and_none_of_a_single_one():
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
def test_what_has_no_k_of_its_own_is_refused(moe, sparsity, message):
    with pytest.raises(ConfigError, match=message):
        check_ranks(config(moe, **sparsity))


def test_rows_of_one_document_are_squared_apart_and_added():
    model, rows = model_of(config(default=0.25)), rows_of(num_sequences=2)
    apart = DocumentSequences(rows.batches, (torch.arange(2)[:, None].expand_as(rows.documents[0]),), 2)
    together = DocumentSequences(rows.batches, (torch.zeros_like(rows.documents[0]),), 1)
    two, one = estimate(model, apart, (0.75,)), estimate(model, together, (0.75,))
    for cell in cells_of(model.sparsity_plan):
        np.testing.assert_allclose(one.second[cell][:, 0], two.second[cell].sum(1), rtol=1e-9, err_msg=cell.name)
        np.testing.assert_allclose(one.first[cell][:, 0], two.first[cell].sum(1), atol=1e-9, err_msg=cell.name)
    assert sum((two.second[cell] > 0).all() for cell in two.second) > 10


def test_maps_of_all_sites_share_one_scale_have_a_bar_with_the_unit_and_hatch_cells_whose_interval_holds_0():
    model, rows = model_of(config(default=0.25)), rows_of(num_sequences=6)
    found = measure(model, rows, (0.25, 0.5, 0.75), draws=50)
    figures = {name: figure for name, figure in _figures(found).items() if name.startswith("map-")}
    assert len(figures) == 4
    ends, hatched = set(), {}
    for name, figure in figures.items():
        *panels, bar = figure.axes
        assert [axis.get_title() for axis in panels] == [
            "S=0.5",
            "S=0.75",
        ] and "1/1000 nats per token" in bar.get_ylabel()
        ends |= {(axis.images[0].norm.vmin, axis.images[0].norm.vmax) for axis in panels}
        for axis, value in zip(panels, (0.5, 0.75), strict=True):
            for patch in axis.patches:
                place = round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)
                hatched.setdefault((name.removeprefix("map-"), value), set()).add(place)
    ((low, high),) = ends
    assert -low == high == pytest.approx(1000 * max(abs(point.exact) for point in found.changes))
    noise = {}
    for point in found.changes:
        if point.exact_interval[0] <= 0 <= point.exact_interval[1]:
            noise.setdefault((point.cell.site, point.sparsity), set()).add((point.cell.layer, point.cell.expert or 0))
    assert hatched == noise and 0 < sum(map(len, noise.values())) < len(found.changes)


def test_a_map_of_estimates_marks_noise_by_their_own_interval():
    model, rows = model_of(config(default=0.25)), rows_of(num_sequences=6)
    found = measure(model, rows, (0.75,), exact=False, draws=50)
    axis = _figures(found)["map-expert_hidden"].axes[0]
    own = [point for point in found.changes if point.cell.site == "expert_hidden"]
    assert len(axis.patches) == sum(p.estimate_interval[0] <= 0 <= p.estimate_interval[1] for p in own)
    values = np.asarray(axis.images[0].get_array())
    for point in own:
        assert values[point.cell.layer, point.cell.expert] == pytest.approx(1000 * point.estimate)


def test_an_interval_that_ends_at_0_decides_nothing_and_every_cell_is_listed_at_its_costliest_s():
    cells = [Cell(layer, "expert_hidden", None) for layer in range(12)]

    def change(cell, sparsity, exact, interval):
        return CellChange(cell, sparsity, 2 * exact, interval, exact, exact, interval, None)

    edges = [change(cells[0], 0.5, 0.1, ends) for ends in ((0.0, 0.2), (-0.2, 0.0), (0.01, 0.2), (-0.2, -0.01))]
    assert [one.is_decided for one in edges] == [False, False, True, True]
    changes = [change(cell, s, s * (1 + layer), (0.0, 1.0)) for layer, cell in enumerate(cells) for s in (0.75, 0.5)]
    rows = costliest_rows(SimpleNamespace(changes=changes))
    assert [(row[0], row[1]) for row in rows] == [(cell.name, "0.75") for cell in cells[:1:-1]]
    assert rows[0][2:] == ("+18.0000 (+0.0000 to +1.0000)", "+9.0000 (+0.0000 to +1.0000)")
