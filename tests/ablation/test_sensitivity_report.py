"""Changes of the loss from sums per document, and what is written of them: JSON, CSV, Markdown, and figures."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qsparse_moe.ablation.cells import Cell
from qsparse_moe.ablation.sensitivity import measure as measure_module
from qsparse_moe.ablation.sensitivity.documents import DocumentSequences, token_losses
from qsparse_moe.ablation.sensitivity.estimate import Estimate
from qsparse_moe.ablation.sensitivity.figures import _scatter
from qsparse_moe.ablation.sensitivity.measure import (
    CellChange,
    Sensitivity,
    _agreement,
    _cell_changes,
    _pairs,
    agreements,
    load_ranked,
)
from qsparse_moe.ablation.sensitivity.report import agreement_rows, as_dict, markdown, table, write_csv
from qsparse_moe.data.batch import make_batch
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.distributed.ranks import ONE_RANK
from tests.ablation.small_models import config

FIRST, SECOND = Cell(0, "attention_input", None), Cell(1, "expert_hidden", 2)


def change(cell, sparsity, estimate, exact=None, *, first=0.0, interval=(0.1, 0.2), halves=None):
    exact_interval = None if exact is None else (exact - 0.01, exact + 0.02)
    return CellChange(cell, sparsity, estimate, interval, first, exact, exact_interval, halves)


def sensitivity(changes, **fields):
    plan = SparsityPlan({(0, "attention_input"): (0.25,), (1, "expert_hidden"): (0.5, 0.5, 0.75)})
    given = {"plan": plan, "num_sequences": 6, "documents": 9, "loss": 2.34567, "estimate_seconds": 0.5}
    given |= {"exact_seconds": 21.0, "evaluations": 8, "agreement": agreements(changes)}
    return Sensitivity(changes=tuple(changes), **given | fields)


def evaluated():
    halves = [(0.1, 0.2), (0.3, 0.1), (0.2, 0.4)]
    exact = [0.0, 0.3, 0.2]
    return [
        change(FIRST, 0.5, 0.02, exact[0], first=0.3, halves=halves[0]),
        change(FIRST, 0.75, 0.5, exact[1], first=0.2, halves=halves[1]),
        change(SECOND, 0.75, -0.1, exact[2], first=0.1, halves=halves[2]),
    ]


def test_changes_are_sums_over_documents_divided_by_all_labels_at_the_s_of_each_pair():
    labels_C = np.array([1.0, 3.0, 4.0])
    values = {cell: scale * np.arange(9.0).reshape(3, 3) for cell, scale in ((FIRST, 1.0), (SECOND, 10.0))}
    estimated = Estimate(values, {cell: 0.5 + own for cell, own in values.items()})
    pairs = [(FIRST, 2, 0.75), (SECOND, 0, 0.25)]
    losses = [np.array([8.0, 0.0, 16.0]), np.array([0.0, -8.0, 0.0])]
    one, other = _cell_changes(pairs, estimated, losses, labels_C, 200)
    # Rows of S: 6 + 7 + 8 at the third, 0 + 10 + 20 at the first; the second order has 0.5 per document more.
    assert (one.cell, one.sparsity, one.first_order, one.estimate) == (FIRST, 0.75, 21 / 8, (21 + 22.5) / 8)
    assert (other.cell, other.sparsity, other.first_order, other.estimate) == (SECOND, 0.25, 30 / 8, 61.5 / 8)
    assert (one.exact, other.exact) == (3.0, -1.0)
    # Documents 0 and 2 have 5 labels together, document 1 has 3.
    assert one.exact_halves == pytest.approx((24 / 5, 0.0)) and other.exact_halves == pytest.approx((0.0, -8 / 3))
    for found in (one, other):
        assert found.exact_interval[0] <= found.exact <= found.exact_interval[1]
        assert found.estimate_interval[0] <= found.estimate <= found.estimate_interval[1]
    # A draw of the second document alone is possible in few of the resamples: the interval of the first is wider.
    assert other.exact_interval[1] == 0.0 and other.exact_interval[0] < -2
    (alone,) = _cell_changes(pairs[:1], estimated, None, labels_C, 10)
    assert (alone.exact, alone.exact_interval, alone.exact_halves) == (None, None, None) and not alone.is_decided


def test_every_cell_takes_every_other_s_at_its_place_among_the_values():
    plan = SparsityPlan({(0, "attention_input"): (0.5,), (1, "expert_hidden"): (0.0, 0.5)})
    assert _pairs(plan, (0.0, 0.5, 0.9)) == [
        (Cell(0, "attention_input", None), 0, 0.0),
        (Cell(0, "attention_input", None), 2, 0.9),
        (Cell(1, "expert_hidden", 0), 1, 0.5),
        (Cell(1, "expert_hidden", 0), 2, 0.9),
        (Cell(1, "expert_hidden", 1), 0, 0.0),
        (Cell(1, "expert_hidden", 1), 2, 0.9),
    ]


def test_an_agreement_compares_each_term_with_the_exact_changes_and_needs_three_of_them():
    all_of_them, *by_value = agreements(evaluated())
    assert by_value == [], "two changes at 0.75 always agree"
    # Exact 0, 0.3, 0.2: ranks 1 3 2. Estimates 0.02, 0.5, -0.1: ranks 2 3 1. First order 0.3, 0.2, 0.1: ranks 3 2 1.
    assert (all_of_them.spearman, all_of_them.spearman_first_order) == pytest.approx((0.5, -0.5))
    assert all_of_them.pearson == pytest.approx(np.corrcoef([0.02, 0.5, -0.1], [0.0, 0.3, 0.2])[0, 1])
    # Halves 0.1 0.3 0.2 and 0.2 0.1 0.4: ranks 1 3 2 and 2 1 3.
    assert all_of_them.spearman_halves == pytest.approx(-0.5)
    # The interval of the first contains 0.
    assert (all_of_them.points, all_of_them.decided, all_of_them.spearman_decided) == (3, 2, None)
    more = [*evaluated(), change(SECOND, 0.5, 0.9, 0.1, halves=(0.4, float("nan")))]
    found = _agreement(None, more)
    # Decided: exact 0.3 0.2 0.1 and estimates 0.5 -0.1 0.9.
    assert (found.decided, found.spearman_decided, found.spearman_halves) == (3, pytest.approx(-0.5), None)
    groups = agreements([*evaluated(), change(SECOND, 0.75, 0.9, 0.1)])
    assert [(one.sparsity, one.points) for one in groups] == [(None, 4), (0.75, 3)]
    assert groups[0].spearman_halves is None, "one change has no halves"


def test_a_report_has_every_value_under_its_public_key():
    found = sensitivity(evaluated())
    report = as_dict(found, run_dir="runs/x", step=7)
    agreement, points = report.pop("agreement"), report.pop("points")
    assert report == {
        "format": "qsparse_moe.sensitivity/2",
        "run_dir": "runs/x",
        "step": 7,
        "mean_sparsity": pytest.approx((0.25 + (0.5 + 0.5 + 0.75) / 3) / 2),
        "rows": 6,
        "documents": 9,
        "loss": 2.34567,
        "estimate_seconds": 0.5,
        "exact_seconds": 21.0,
        "evaluations": 8,
        "times_cheaper": 42.0,
        "routing": [],
        "plans": None,
    }
    assert [one["points"] for one in agreement] == [3]
    assert points[2] == {
        "layer": 1,
        "site": "expert_hidden",
        "expert": 2,
        "sparsity": 0.75,
        "estimate": -0.1,
        "estimate_low": 0.1,
        "estimate_high": 0.2,
        "first_order": 0.1,
        "exact": 0.2,
        "exact_low": pytest.approx(0.19),
        "exact_high": pytest.approx(0.22),
    }


def test_a_table_of_changes_has_empty_cells_where_there_is_no_expert_and_no_evaluation(tmp_path):
    write_csv([change(FIRST, 0.5, 0.25, first=0.125), evaluated()[2]], tmp_path / "points.csv")
    head, one, other = csv.reader((tmp_path / "points.csv").read_text().splitlines())
    assert head == ["layer", "site", "expert", "sparsity", "estimate", "estimate_low", "estimate_high"] + [
        *("first_order", "exact", "exact_low", "exact_high")
    ]
    assert one == ["0", "attention_input", "", "0.5", "0.25", "0.1", "0.2", "0.125", "", "", ""]
    assert other[:5] == ["1", "expert_hidden", "2", "0.75", "-0.1"] and other[8] == "0.2"


def test_a_report_in_words_has_times_agreement_and_cells_or_the_cells_alone_without_an_evaluation():
    found = sensitivity(evaluated())
    title, said, times, agreement, reading, most, cells = markdown(found, title="mine").split("\n\n")
    assert title == "# mine" and most == "Most sensitive cells:"
    assert said == (
        "Loss 2.3457 nats per token at mean S 0.417, on 6 validation sequences of 9 documents. Changes are in nats per "
        "token; intervals are 95 % by bootstrap over documents."
    )
    assert times == (
        "The estimate took 0.50 s, one forward and 2 backward passes; the evaluations 21.0 s, 8 forward passes: 42 "
        "times as long."
    )
    pearson = np.corrcoef([0.02, 0.5, -0.1], [0.0, 0.3, 0.2])[0, 1]
    assert agreement.splitlines()[2] == f"| all | 3 | 0.500 | {pearson:.3f} | -0.500 | -0.500 | 2 | – |"
    assert reading.startswith("Halves: rank correlation")
    assert cells.splitlines()[2:] == [
        "| layer 0, attention_input | 0.75 | +0.5000 (+0.1000 to +0.2000) | +0.3000 (+0.2900 to +0.3200) |",
        "| layer 1, expert_hidden, expert 2 | 0.75 | -0.1000 (+0.1000 to +0.2000) | +0.2000 (+0.1900 to +0.2200) |",
    ]
    alone = sensitivity([change(FIRST, 0.5, 0.25)], exact_seconds=None, evaluations=0, agreement=())
    *_, most, cells = markdown(alone, title="mine").split("\n\n")
    assert len(markdown(alone, title="mine").split("\n\n")) == 4 and alone.times_cheaper is None
    assert cells.splitlines()[2:] == ["| layer 0, attention_input | 0.5 | +0.2500 (+0.1000 to +0.2000) | – |"]
    assert [row[0] for row in agreement_rows(sensitivity([change(FIRST, 0.125, s, s) for s in (1.0, 2.0, 3.0)]))] == [
        *("all", "0.125")
    ]
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_estimate_is_drawn_over_the_evaluation_with_the_diagonal_and_a_scale_of_a_whole_decade():
    (axes,) = _scatter(sensitivity(evaluated())).figure.axes
    half, three_quarters, diagonal = axes.lines
    assert half.get_xydata().tolist() == [[0.0, 0.02]]
    assert three_quarters.get_xydata().tolist() == [[0.3, 0.5], [0.2, -0.1]]
    assert diagonal.get_xydata().tolist() == [[0.0, 0.0], [0.3, 0.3]]
    # The median of 0, 0.2, and 0.3 lies between 0.1 and 1.
    assert axes.xaxis.get_transform().linthresh == axes.yaxis.get_transform().linthresh == 1.0
    assert axes.get_title() == "Spearman 0.500 over 3 changes"
    assert (half.get_label(), three_quarters.get_label()) == ("S=0.5", "S=0.75")


@pytest.mark.parametrize(("sparsity", "mean"), [(None, 0.5), (0.0, 0.0), (0.75, 0.75)])
def test_a_model_has_its_own_plan_unless_an_s_is_given_and_0_is_one(monkeypatch, sparsity, mean):
    settings = config(default=0.5)
    model = SimpleNamespace(sparsity_plan=SparsityPlan.from_config(settings))
    model.set_sparsity = lambda plan: setattr(model, "sparsity_plan", plan)
    asked = []

    def load_trained(*values, **named):
        asked.append((values, named))
        return SimpleNamespace(model=settings), model, 12

    monkeypatch.setattr(measure_module, "load_trained", load_trained)
    _, found, step = load_ranked("runs/x", ONE_RANK, sparsity, ["data.mode=table"], True)
    assert (found.sparsity_plan.mean, step) == (mean, 12)
    named = {"overrides": ["data.mode=table"], "distributed": ONE_RANK, "shard": True}
    assert asked == [(("runs/x", ONE_RANK.device), named)]


def test_the_evaluation_reports_its_progress_and_its_time_includes_the_pass_under_the_plan(monkeypatch):
    plan, settings = SparsityPlan.uniform(config(default=0.5), 0.5), config(default=0.5)
    model = SimpleNamespace(sparsity_plan=plan, config=settings)
    model.set_sparsity = lambda other: setattr(model, "sparsity_plan", other)
    tokens = np.ones((3, 4), np.int64)
    batch = make_batch(tokens, document_token=0, attend_across_documents=False)
    documents = torch.tensor([[0, 0, 1], [1, 1, 1], [3, 3, 3]])
    sequences = DocumentSequences((batch,), (documents,), 5)
    # Documents 2 and 4 have no label.
    assert sequences.labels_C.tolist() == [2.0, 4.0, 0.0, 3.0, 0.0] and sequences.num_sequences == 3
    clock, told, seen = iter([0.0, 2.0, 10.0, 11.0, 100.0, 140.0]), [], []

    def loss_by_document(given, _):
        seen.append(given.sparsity_plan)
        return np.array([1.0, 2.0, 0.0, 6.0, 0.0]) + len(seen) - 1

    zeros = np.zeros((2, 5))
    cells = dict.fromkeys(measure_module.cells_of(plan), zeros)
    monkeypatch.setattr(measure_module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure_module, "loss_by_document", loss_by_document)
    monkeypatch.setattr(measure_module, "estimate", lambda *_: Estimate(cells, cells))
    monkeypatch.setattr(measure_module, "agreements", lambda _: ("agreement",))
    found = measure_module.measure(model, sequences, (0.5, 0.75), draws=5, notify=lambda *done: told.append(done))
    count = len(cells)
    assert told == [(done, count) for done in range(1, count + 1)]
    assert (found.evaluations, found.loss) == (count + 1, 1.0)
    assert (found.estimate_seconds, found.exact_seconds, found.times_cheaper) == (1.0, 42.0, 42.0)
    # All five documents are worse by 1, then by 2, and so on, over 9 labels.
    assert [one.exact for one in found.changes] == pytest.approx([5 * done / 9 for done in range(1, count + 1)])
    assert model.sparsity_plan == plan and seen[0] == plan and len({id(one) for one in seen}) == count + 1


def test_losses_of_half_precision_logits_are_computed_in_single_precision_and_ignored_labels_have_none():
    logits = torch.tensor([[[3.0, -1.0, 0.5], [0.25, 2.0, 1.0]]])
    labels = torch.tensor([[2, -100]])
    found = token_losses(logits.bfloat16(), labels)
    expected = torch.logsumexp(logits[0, 0], 0) - 0.5
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([float(expected), 0.0], rel=1e-6)
    assert token_losses(logits.double(), labels).dtype == torch.float64
