"""Verdicts of made-up losses, computed by hand: differences by seed, intervals, and the seeds that would decide."""

from __future__ import annotations

import pytest
from scipy.stats import ttest_1samp

from qsparse_moe.ablation.grid.claims import Comparison
from qsparse_moe.ablation.grid.comparison_figure import draw_comparisons
from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.ablation.grid.search import Sample
from qsparse_moe.ablation.grid.verdicts import MOST_SEEDS, decide, interval, seeds_to_decide

SIZES = """
base: base.yaml
seeds: [0, 1, 2]
variants: {a: , b: {model.sparsity.default: 0.5}, c: {model.sparsity.default: 0.25}}
axes: {size: {small: {model.num_layers: 1}, large: {model.num_layers: 2}}}
comparisons:
"""
SMALL, LARGE = '{"size": "small"}', '{"size": "large"}'


def verdicts(write, claim, **losses):
    """The verdicts of one claim; ``a_small=[...]`` are the losses of a in the small cell by seed, None: no run."""
    grid = load_grid(write(SIZES + f"  - {{name: claim, source: section 1, {claim}}}\n"))
    known = {}
    for key, values in losses.items():
        variant, size = key.split("_")
        known[variant, SMALL if size == "small" else LARGE] = Sample(
            {seed: value for seed, value in enumerate(values) if value is not None}
        )
    (found,) = decide(grid, known)
    return found.cells


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3], [-1.0, 4.0], [0.5, 0.25, 0.125, 0.7, 0.1]])
def test_the_interval_is_that_of_a_one_sample_t_test(values):
    ends = ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((ends.low, ends.high), rel=1e-12)
    assert interval(values[:1]) is None


def test_an_order_is_decided_by_the_interval_of_the_differences_within_each_seed(write):
    # Differences 0.2, 0.21, 0.22, whatever the seeds themselves are: t(2) 4.303 * 0.01 / sqrt(3) = 0.0248.
    small, large, over_all = verdicts(
        write, "order: [a, b]", a_small=[3, 5, 9], b_small=[3.2, 5.21, 9.22], a_large=[1, 1, 1], b_large=[1.1, 1.2, 1.3]
    )
    (pair,) = small.pairs
    assert (small.verdict, small.runs_needed, pair.seeds_needed) == ("holds", None, None)
    assert pair.mean == pytest.approx(0.21) and pair.spread == pytest.approx(0.01)
    assert pair.interval == pytest.approx((0.21 - 0.02484, 0.21 + 0.02484), abs=1e-5)
    # Differences 0.1, 0.2, 0.3: half 4.303 * 0.1 / sqrt(3) = 0.248 > 0.2, but 3.182 * 0.1 / sqrt(4) = 0.159 < 0.2.
    (pair,) = large.pairs
    assert (large.verdict, pair.seeds_needed, large.runs_needed) == ("not decided", 4, 2)
    # Seeds are blocks: the means over both cells are 0.15, 0.205, 0.26, of which 0.205 - 4.303 * 0.055 / sqrt(3) > 0.
    (pair,) = over_all.pairs
    assert (over_all.cell, over_all.cells, over_all.verdict) == (None, 2, "holds")
    assert list(pair.by_seed.values()) == pytest.approx([0.15, 0.205, 0.26])


def test_an_order_that_is_reversed_does_not_hold_here(write):
    small, large, over_all = verdicts(write, "order: [b, a]", a_small=[3, 5, 9], b_small=[3.2, 5.21, 9.22])
    assert (small.verdict, small.runs_needed) == ("does not hold here", None)
    # The large cell has no runs, so that the mean over all cells is that of the small one.
    assert (large.verdict, large.pairs[0].mean, large.pairs[0].interval) == ("not decided", None, None)
    assert (over_all.verdict, over_all.cells) == ("does not hold here", 1)


def test_a_longer_order_holds_if_every_neighbour_does_and_fails_if_one_does_not(write):
    a, above, below = [1.0, 1.0, 1.0], [2.0, 2.1, 2.2], [0.5, 0.6, 0.7]
    order = "order: [a, b, c]"
    held, _, _ = verdicts(write, order, a_small=a, b_small=above, c_small=[5, 5, 5])
    assert held.verdict == "holds" and [pair.verdict for pair in held.pairs] == ["holds", "holds"]
    failed, _, _ = verdicts(write, order, a_small=a, b_small=below, c_small=[5, 5, 5])
    assert [pair.verdict for pair in failed.pairs] == ["does not hold here", "holds"]
    assert failed.verdict == "does not hold here"
    # c - b is 0.1, 0.2, 0.3 and needs a fourth seed of b and c; a has enough.
    unknown, _, _ = verdicts(write, order, a_small=a, b_small=above, c_small=[2.1, 2.3, 2.5])
    assert [pair.verdict for pair in unknown.pairs] == ["holds", "not decided"]
    assert (unknown.verdict, unknown.runs_needed) == ("not decided", 2)


@pytest.mark.parametrize(
    ("differences", "verdict", "needed"),
    [
        # Half widths are 0.0248 for the spread of 0.01, and 0.248 for 0.1.
        ([0.0, 0.01, 0.02], "holds", None),
        ([-0.02, -0.01, 0.0], "holds", None),
        ([0.2, 0.21, 0.22], "does not hold here", None),
        ([-0.22, -0.21, -0.2], "does not hold here", None),
        # The nearest bound is 0.05 - 0.03 = 0.02 away: 3.182 * 0.01 / sqrt(4) = 0.0159.
        ([0.02, 0.03, 0.04], "not decided", 4),
        # As far on the other side.
        ([0.06, 0.07, 0.08], "not decided", 4),
    ],
)
def test_closeness_is_decided_by_an_interval_inside_or_outside_of_the_bound(write, differences, verdict, needed):
    losses = {"a_small": [1.0, 2.0, 3.0], "b_small": [i + 1 + one for i, one in enumerate(differences)]}
    small, _, _ = verdicts(write, "close: [a, b], within: 0.05", **losses)
    assert (small.verdict, small.pairs[0].seeds_needed) == (verdict, needed)


@pytest.mark.parametrize(("way", "verdict"), [("shrinks", "holds"), ("grows", "does not hold here")])
def test_a_gap_is_compared_with_that_at_the_first_value_of_its_axis_seed_by_seed(write, way, verdict):
    # b - a is 0.5, 0.6, 0.7 in the small model and 0.3, 0.41, 0.52 in the large one: it shrinks by 0.2, 0.19, 0.18.
    losses = {"a_small": [1, 1, 1], "b_small": [1.5, 1.6, 1.7], "a_large": [2, 3, 4], "b_large": [2.3, 3.41, 4.52]}
    large, over_all = verdicts(write, f"order: [a, b], gap_{way}_over: size", **losses)
    (pair,) = large.pairs
    sign = 1 if way == "shrinks" else -1
    assert list(pair.by_seed.values()) == pytest.approx([sign * 0.2, sign * 0.19, sign * 0.18])
    assert (large.cell, large.cells, large.verdict) == (LARGE, 2, verdict)
    assert (over_all.cells, over_all.verdict) == (2, verdict) and over_all.pairs[0].by_seed == pair.by_seed
    # Of 0.1, 0.2, 0.3 a fourth seed decides, of two variants in two cells.
    losses["b_large"] = [2.4, 3.4, 4.4]
    large, _ = verdicts(write, f"order: [a, b], gap_{way}_over: size", **losses)
    assert (large.pairs[0].seeds_needed, large.runs_needed) == (4, 4)


def test_only_seeds_that_both_variants_have_count_and_one_seed_decides_nothing(write):
    small, large, over_all = verdicts(
        write, "order: [a, b]", a_small=[1, None, 3], b_small=[2, 2, None], a_large=[1, 1, 1], b_large=[2, 2.1, 2]
    )
    assert small.pairs[0].by_seed == {0: 1} and small.pairs[0].interval is None
    assert (small.verdict, small.pairs[0].seeds_needed, small.runs_needed) == ("not decided", None, None)
    assert (large.verdict, over_all.cells, over_all.verdict) == ("holds", 1, "holds")


def test_every_difference_is_drawn_with_its_interval_and_the_colour_of_its_verdict(write):
    claims = (
        "  - {name: order, source: s, order: [a, b, c]}\n  - {name: close, source: s, close: [a, b], within: 0.3}\n"
    )
    grid = load_grid(write(SIZES + claims + "  - {name: gap, source: s, order: [a, b], gap_grows_over: size}\n"))
    losses = {"a": [1.0, 2.0, 3.0], "b": [1.2, 2.21, 3.22], "c": [1.0, 2.0, 3.0]}
    known = {(variant, SMALL): Sample(dict(enumerate(own))) for variant, own in losses.items()}
    assert draw_comparisons(decide(grid, {})) is None
    figure = draw_comparisons(decide(grid, known))
    # The gap needs both sizes, of which only one has runs.
    order, close = figure.axes
    assert (order.get_title(), close.get_title()) == ("order", "close")
    names = ["small: b − a", "small: c − b", "all: b − a", "all: c − b"]
    assert [label.get_text() for label in order.get_yticklabels()] == names
    bars = [(line.get_color(), *line.get_xdata()) for line in order.lines if len(line.get_xdata()) == 2]
    half = 4.302653 * 0.01 / 3**0.5
    above, below = ("tab:blue", 0.21 - half, 0.21 + half), ("tab:orange", -0.21 - half, -0.21 + half)
    assert [bar[0] for bar in bars[:4]] == [above[0], below[0]] * 2
    assert [bar[1:] for bar in bars[:2]] == [pytest.approx(above[1:]), pytest.approx(below[1:])]
    assert [line.get_xdata()[0] for line in close.lines][-2:] == [-0.3, 0.3]


def test_a_grid_without_axes_has_no_second_row_over_all_cells(write):
    grid = load_grid(write(SIZES.replace("axes: {size", "# {size") + "  - {name: n, source: s, order: [a, b]}\n"))
    (found,) = decide(grid, {("a", "{}"): Sample({0: 1.0, 1: 1.0}), ("b", "{}"): Sample({0: 2.0, 1: 2.1})})
    assert [cell.cell for cell in found.cells] == ["{}"] and found.cells[0].pairs[0].mean == pytest.approx(1.05)


def test_no_number_of_seeds_is_proposed_where_no_sensible_one_decides():
    assert seeds_to_decide(0.0, 0.1) is None
    assert seeds_to_decide(1.0, 0.0) == 2
    # About (1.96 / 0.05)^2 = 1537 seeds.
    assert seeds_to_decide(0.05, 1.0) is None
    assert 380 < seeds_to_decide(0.1, 1.0) < 390 <= MOST_SEEDS


def test_pairs_are_the_neighbours_of_the_order():
    claim = Comparison(name="n", source="s", order=["a", "b", "c"])
    assert claim.pairs == [("a", "b"), ("b", "c")]
