"""Verdicts by the value of one axis over the others, computed by hand, and where the report shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qsparse_moe.ablation.grid.comparison_figure import draw_comparisons
from qsparse_moe.ablation.grid.comparison_report import comparisons_dict
from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.page import grid_page
from qsparse_moe.ablation.grid.report import markdown, report_sections
from qsparse_moe.ablation.grid.run_result import result_of
from qsparse_moe.ablation.grid.search import Sample
from qsparse_moe.ablation.grid.verdicts import decide, verdict_label
from qsparse_moe.ablation.page.html import html_of
from tests.support.pages import read_page

CROSSED = """
base: base.yaml
seeds: [0, 1, 2]
variants: {a: , b: {model.sparsity.default: 0.5}}
axes:
  size: {1M: {model.num_layers: 1}, 8M: {model.num_layers: 2}}
  training.steps: [2, 4]
  model.sparsity.rescale: [none]
comparisons:
  - {name: a below b, source: section 4, order: [a, b]}
  - {name: grows, source: section 3, order: [a, b], gap_grows_over: training.steps}
"""
# b - a by size, steps, and seed. The third seed is not in every cell, and 8M has no results at 4 steps.
GAPS = {("1M", 2): [0.1, 0.3, 0.5], ("1M", 4): [0.3, 0.4], ("8M", 2): [-0.5, -0.6, -0.7]}


def grid_and_samples(write, text=CROSSED, gaps=None):
    grid = load_grid(write(text))
    known = {}
    for run in grid.runs:
        own = (gaps or GAPS).get((run.place.get("size"), run.place.get("training.steps")), [])
        losses = {seed: 2.0 + seed + (gap if run.entry == "b" else 0.0) for seed, gap in enumerate(own)}
        known[run.entry, grid.cell(run)] = Sample(losses)
    return grid, known


def results_of(grid, known):
    finished = replace(result_of(grid, grid.runs[0]), finished=True)
    losses = {run.id: known[run.entry, grid.cell(run)].by_seed.get(run.seed) for run in grid.runs}
    return [
        replace(finished, id=run.id, variant=run.variant, seed=run.seed, bits_per_byte=losses[run.id])
        if losses[run.id] is not None
        else result_of(grid, run)
        for run in grid.runs
    ]


def test_a_value_of_an_axis_is_decided_over_the_cells_that_have_results_seed_by_seed(write):
    claim, _ = decide(*grid_and_samples(write))
    by_label = {verdict_label(one): one for one in claim.by_axis}
    assert list(by_label) == [
        "1M, mean over steps",
        "8M, mean over steps",
        "steps 2, mean over size",
        "steps 4, mean over size",
    ]
    # (0.1 + 0.3) / 2 and (0.3 + 0.4) / 2; the third seed is not in both cells. t(1) 12.706 * 0.1061 / sqrt(2) = 0.953.
    small = by_label["1M, mean over steps"]
    (pair,) = small.pairs
    assert dict(pair.by_seed) == pytest.approx({0: 0.2, 1: 0.35}) and (small.cells, small.possible_cells) == (2, 2)
    assert pair.interval == pytest.approx((0.275 - 0.953, 0.275 + 0.953), abs=1e-3) and small.verdict == "not decided"
    # Only the shorter length of 8M has results: -0.5, -0.6, -0.7.
    large = by_label["8M, mean over steps"]
    assert (large.cells, large.possible_cells, large.verdict) == (1, 2, "does not hold here")
    assert list(by_label["steps 2, mean over size"].pairs[0].by_seed.values()) == pytest.approx([-0.2, -0.15, -0.1])
    assert by_label["steps 4, mean over size"].cells == 1
    # What repeats the results of one cell is not listed twice.
    assert [verdict_label(one) for one in claim.every][4:] == ["1M, mean over steps", "steps 2, mean over size", "all"]


def test_a_gap_over_one_axis_is_decided_by_value_of_the_other(write):
    gaps = GAPS | {("8M", 4): [-0.4, -0.45, -0.5]}
    three = CROSSED.replace("[2, 4]", "[2, 4, 6]")
    _, claim = decide(*grid_and_samples(write, three, gaps | {("1M", 6): [0.5, 0.7]}))
    # From 2 to 4 steps 0.2 and 0.1, to 6 steps 0.4 and 0.4. Three lengths are behind it.
    small = claim.by_axis[0]
    assert verdict_label(small) == "1M, mean over steps" and (small.cells, small.possible_cells) == (3, 3)
    assert list(small.pairs[0].by_seed.values()) == pytest.approx([0.3, 0.25])
    large = claim.by_axis[1]
    assert (large.cells, large.possible_cells) == (2, 3)
    # From 2 to 4 steps, 1M has 0.2 and 0.1, 8M 0.1 and 0.15.
    assert list(claim.by_axis[2].pairs[0].by_seed.values()) == pytest.approx([0.15, 0.125])
    assert verdict_label(claim.by_axis[2]) == "steps 4, mean over size"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # One axis that varies: a value of it is a cell, and its only other value is the whole.
        ("size: {1M: {model.num_layers: 1}, 8M: {model.num_layers: 2}}", "size: {1M: {model.num_layers: 1}}"),
        ("comparisons:", 'exclude: ["*-1M-*-2-*", "*-8M-*-4-*"]\ncomparisons:'),
    ],
)
def test_a_verdict_that_would_repeat_a_cell_or_the_whole_is_not_made(write, old, new):
    text = CROSSED.split("  - {name: grows")[0].replace(old, new)
    grid, known = grid_and_samples(write, text)
    assert [one.by_axis for one in decide(grid, known)] == [()]
    assert "mean over" not in "".join(report_sections(grid, results_of(grid, known))["Claims"])
    assert comparisons_dict(grid, results_of(grid, known))["claims"][0]["by_axis"] == []


def test_the_report_and_the_page_have_a_table_per_axis_and_the_json_every_figure(write):
    grid, known = grid_and_samples(write)
    results = results_of(grid, known)
    report = markdown(grid, results)
    assert (
        "By size, mean over steps:\n\n| claim | 1M | 8M |\n| --- | --- | --- |\n"
        "| a below b | not decided | does not hold here (1 of 2 cells) |\n| grows | – | – |\n\n"
        "By steps, mean over size:\n\n| claim | steps 2 | steps 4 |\n| --- | --- | --- |\n"
        "| a below b | does not hold here | not decided (1 of 2 cells) |\n"
        "| grows | – | – |"
    ) in report
    assert "| a below b | 1M, mean over steps | 2 | a | b | +0.2750 | -0.6780 to +1.2280 | 2 | not decided |" in report
    assert "| a below b | all | 3 of 4 | a | b |" in report and "8M, mean over steps" not in report
    # Differences with two seeds: three cells, two values, and all; of the gap, one cell and all.
    assert "of 8 differences without any effect" in report
    page = read_page(html_of(grid_page(grid, report_sections(grid, results), results, {}, ())))
    assert page.tables["Verdicts by size"][1] == ["a below b", "not decided", "does not hold here (1 of 2 cells)"]
    own, gap = comparisons_dict(grid, results)["claims"]
    assert [(one["axis"], one["value"], one["mean_over"]) for one in own["by_axis"]] == [
        ("size", "1M", ["training.steps"]),
        ("size", "8M", ["training.steps"]),
        ("training.steps", 2, ["size"]),
        ("training.steps", 4, ["size"]),
    ]
    first = own["by_axis"][0]
    assert (first["cells"], first["possible_cells"], first["verdict"]) == (2, 2, "not decided")
    # A third seed, 4.303 * 0.1061 / sqrt(3) = 0.264 < 0.275, of two variants in two cells.
    assert first["runs_needed"] == 4
    assert first["pairs"][0]["difference"] == pytest.approx(0.275) and "cell" not in first
    assert [cell["cell"] for cell in own["cells"]][-1] is None and gap["by_axis"] == []


def test_the_figure_has_a_bar_for_each_value_of_an_axis_between_the_cells_and_all(write):
    grid, known = grid_and_samples(write)
    axes = draw_comparisons(decide(grid, known)).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[-3:] == ["1M, mean over steps", "steps 2, mean over size", "all"] and len(labels) == 6
