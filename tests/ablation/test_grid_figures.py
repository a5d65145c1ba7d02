"""The figures of a grid, each at the edge of its rule."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from qsparse_moe.ablation.grid.expert_figures import differences, expert_maps
from qsparse_moe.ablation.grid.figures import (
    _complete_map,
    _levels,
    _name,
    _scatter,
    grid_drawings,
    iso_loss,
    loss_by_parameters,
    write_figures,
)
from qsparse_moe.ablation.grid.panels import legend
from qsparse_moe.ablation.grid.scan_figures import (
    loss_by_cell,
    loss_by_sparsity,
)
from qsparse_moe.ablation.grid.variants import (
    VariantResult,
)

HIDDEN = "expert_hidden"
OVERRIDES = "model.sparsity.overrides"


def variant(loss=2.0, cells=(), *, name="v", settings=None, seeds=None, spread=0.0, choices=(), **record):
    """A variant with ``cells`` as ``varied_sparsity`` lists them."""
    known = {"hidden_size": 32, "num_layers": 2, "num_experts": 4, "experts_per_token": 2, "sparsity": 0.5}
    own = {OVERRIDES: [1]} if settings is None else settings
    known |= {"variant": name, "settings": own, "varied_sparsity": list(cells), "choices": list(choices)} | record
    return VariantResult(known, loss, spread, {} if seeds is None else seeds)


def record(name, loss, seed, **changes):
    return {"variant": name, "loss": loss, "seed": seed, "finished": True} | changes


def experts(*changes, seeds=(0, 1)):
    """The first variant, and one per (layer, expert, S, change of the loss by seed)."""
    base = variant(2.0, [(layer, HIDDEN, None, 0.0) for layer in (1, 3)], name="dense", seeds=dict.fromkeys(seeds, 2.0))
    found = [base]
    for layer, expert, sparsity, by_seed in changes:
        others = [e for e in range(4) if e != expert]
        cells = [(own, HIDDEN, None, 0.0) for own in (1, 3) if own != layer]
        cells += [(layer, HIDDEN, others, 0.0), (layer, HIDDEN, [expert], sparsity)]
        own = {s: 2.0 + value for s, value in zip(seeds, by_seed, strict=True)}
        found.append(variant(sum(own.values()) / len(own), cells, seeds=own))
    return found


def test_maps_of_experts_have_a_panel_per_s_in_order_and_hatch_what_is_within_the_noise_in_either_direction():
    changes = [
        (3, 2, 0.9, (0.1, 0.1)),
        (1, 0, 0.5, (-0.1, -0.1)),
        (3, 0, 0.5, (0.01, -0.01)),
        (1, 2, 0.9, (-0.01, 0.01)),
    ]
    variants = experts(*changes)
    half = differences(variants)[1]
    assert 0.0 < half < 0.1
    figure = expert_maps([*variants, variant(9.0, [(1, HIDDEN, [0, 1], 0.5), (1, HIDDEN, [2, 3], 0.0)])])
    first, second, _ = figure.axes
    assert [axis.get_title() for axis in (first, second)] == ["expert_hidden, S=0.5", "expert_hidden, S=0.9"]
    low, high = (np.ma.filled(axis.images[0].get_array(), np.nan) for axis in (first, second))
    np.testing.assert_allclose(low, [[-100, np.nan, np.nan], [0, np.nan, np.nan]], atol=1e-9)
    np.testing.assert_allclose(high, [[np.nan, np.nan, 0], [np.nan, np.nan, 100]], atol=1e-9)
    assert [text.get_text() for text in first.get_yticklabels()] == ["1", "3"]
    hatched = [{(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in axis.patches} for axis in (first, second)]
    assert hatched == [{(1, 0)}, {(0, 2)}]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"noise: within ±{1000 * half:.2g}, the 95% interval over seeds", "not among the finished runs"]
    assert figure.get_suptitle() == "Validation loss with one expert changed, against dense\nmean of 2 seeds"


def test_a_map_needs_two_variants_that_change_one_expert_to_one_s_each():
    one, other = (1, 0, 0.5, (0.1, 0.1)), (1, 1, 0.5, (0.2, 0.2))
    assert expert_maps(experts(one)) is None and expert_maps(experts(one, other)) is not None
    several = variant(2.0, [(1, HIDDEN, [0], 0.5), (1, HIDDEN, [1, 2, 3], 0.0), (1, "expert_input", [0], 0.75)])
    base = variant(2.0, [(1, HIDDEN, None, 0.0), (1, "expert_input", None, 0.0)])
    assert expert_maps([base, several, several]) is None, "two values of S"
    attention = [variant(2.0, [(1, "attention_input", None, s)]) for s in (0.0, 0.5, 0.75)]
    assert expert_maps(attention) is None, "no experts"


def by_mean(values, **changes):
    return [variant(2.0 + s, settings={"model.sparsity.default": s}, sparsity=s, **changes) for s in values]


def test_lines_over_s_are_sorted_have_bars_if_some_have_seeds_and_at_most_four_panels():
    some = by_mean((0.5, 0.0, 0.75))
    some[1] = some[1]._replace(spread=0.25)
    (axis,) = loss_by_sparsity(some).axes
    line, _, (bars,) = axis.containers[0]
    assert line.get_xdata().tolist() == [0.0, 0.5, 0.75] and line.get_ydata().tolist() == [2.0, 2.5, 2.75]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[1.75, 2.25], [2.5, 2.5], [2.75, 2.75]]
    assert not loss_by_sparsity(by_mean((0.0, 0.5))).axes[0].containers[0].has_yerr
    assert loss_by_sparsity(by_mean((0.5, 0.5))) is None, "one S is no curve"
    four = [one for width in range(4) for one in by_mean((0.0, 0.5), hidden_size=width)]
    assert len(loss_by_sparsity(four).axes) == 4
    assert loss_by_sparsity([*four, *by_mean((0.0, 0.5), hidden_size=9)]) is None


def scanned(*lines, base_at=0.0):
    """The first variant, and per line (layer, pairs of S and change) its variants."""
    layers = [layer for layer, _ in lines]
    found = [variant(2.0, [(layer, HIDDEN, [1], base_at) for layer in layers], name="base", seeds={0: 2.0, 1: 3.0})]
    for layer, pairs in lines:
        for s, change in pairs:
            cells = [(own, HIDDEN, [1], s if own == layer else base_at) for own in layers]
            found.append(variant(9.0, cells, seeds={0: 2.0 + change, 1: 3.0 + change, 2: 50.0}))
    return found


def test_changes_by_cell_are_drawn_from_the_s_of_the_first_variant_beside_each_other():
    figure = loss_by_cell(scanned((0, [(0.9, 0.5), (0.5, 0.25)]), (1, [(0.75, -0.5), (0.5, -0.25)]), base_at=0.125))
    (axis,) = figure.axes
    lines = [container[0] for container in axis.containers]
    np.testing.assert_allclose(lines[0].get_xdata(orig=False), np.array([0.125, 0.5, 0.9]) - 0.003)
    np.testing.assert_allclose(lines[1].get_xdata(orig=False), np.array([0.125, 0.5, 0.75]) + 0.003)
    np.testing.assert_allclose(lines[0].get_ydata(orig=False), [0.0, 0.25, 0.5])
    np.testing.assert_allclose(lines[1].get_ydata(orig=False), [0.0, -0.25, -0.5])
    # A line of one point beside one of two is drawn; several of one point each are not.
    assert loss_by_cell(scanned((0, [(0.9, 0.5), (0.5, 0.25)]), (1, [(0.75, -0.5)]))) is not None
    assert loss_by_cell(scanned((0, [(0.9, 0.5)]), (1, [(0.75, -0.5)]))) is None
    assert loss_by_cell([]) is None


def test_a_line_has_only_variants_that_change_nothing_but_the_one_s_of_their_cells():
    plain = scanned((0, [(0.9, 0.5), (0.5, 0.25)]), (1, [(0.75, -0.5), (0.5, -0.25)]))
    cells = [(layer, HIDDEN, [1], s) for layer, s in ((0, 0.7), (1, 0.0))]
    another = variant(2.5, cells, settings={OVERRIDES: [1], "model.init_std": 0.1})
    two = variant(2.5, [(0, HIDDEN, [1], 0.7), (1, HIDDEN, [1], 0.6)])
    (axis,) = loss_by_cell([*plain, another, two]).axes
    assert [len(container[0].get_xdata()) for container in axis.containers] == [3, 3]
    assert loss_by_cell(scanned((0, [(0.9, 0.5), (0.5, 0.25)]))) is None, "one group of cells is an axis of its own"


def test_the_name_of_many_cells_is_replaced_in_a_legend():
    def many(s):
        return [(layer, HIDDEN, [layer % 4, 7], s) for layer in range(0, 40, 2)]

    base = variant(2.0, [*many(0.0), (99, HIDDEN, [1], 0.0)])
    lines = [variant(2.0 + s, [*many(s), (99, HIDDEN, [1], 0.0)]) for s in (0.5, 0.75)]
    lines.append(variant(2.5, [*many(0.0), (99, HIDDEN, [1], 0.5)]))
    labels = [container.get_label() for container in loss_by_cell([base, *lines]).axes[0].containers]
    assert labels == ["the cells that the grid varies", "layer 99 expert 1 expert_hidden"]


@pytest.mark.parametrize("number", [12, 13])
def test_up_to_twelve_lines_are_drawn_of_which_those_beyond_ten_are_dashed(number):
    figure = loss_by_cell(scanned(*((layer, [(0.9, 0.5), (0.5, 0.25)]) for layer in range(number))))
    if number == 13:
        assert figure is None
        return
    styles = [container[0].get_linestyle() for container in figure.axes[0].containers]
    assert styles == ["-"] * 10 + ["--"] * 2


def table(values, **changes):
    return [
        variant(loss, settings={"model.sparsity.default": s}, num_experts=e, experts_per_token=a, sparsity=s, **changes)
        for (e, a, s), loss in values.items()
    ]


def test_a_map_of_equal_loss_has_exactly_one_variant_at_each_of_at_least_two_by_two_points():
    whole = {(8, 2, 0.0): 1.0, (4, 2, 0.5): 4.0, (8, 2, 0.5): 2.0, (4, 2, 0.0): 3.0}
    assert _complete_map(table(whole)) == ([2.0, 4.0], [0.0, 0.5], [[3.0, 4.0], [1.0, 2.0]])
    near = {(e, a, s + 1e-9 * e): loss for (e, a, s), loss in whole.items()}
    assert _complete_map(table(near)) == _complete_map(table(whole)), "the last bits of S do not count"
    assert _complete_map(table(whole | {(16, 4, 0.0): 9.0})) is None, "two variants at one point"
    assert _complete_map(table({key: whole[key] for key in list(whole)[1:]})) is None
    assert _complete_map(table({key: loss for key, loss in whole.items() if key[0] == 8})) is None
    assert _complete_map(table({key: loss for key, loss in whole.items() if key[2] == 0})) is None
    by_a = [one for a in (1, 2) for one in table({(a * e, a, s): 1.0 + e + s for e in (2, 4) for s in (0.0, 0.5)})]
    assert len(iso_loss(by_a).axes) == 2 + 1, "a panel per A"
    assert (
        iso_loss([one._replace(record=one.record | {"settings": {"model.sparsity.plan": "p"}}) for one in by_a]) is None
    )


def test_a_map_may_join_several_numbers_of_experts_per_token_where_their_panels_would_be_too_many():
    whole = {(2.0 * ratio * a, a, s): 1.0 + ratio + s for a, ratio in enumerate(range(2, 7), 1) for s in (0.0, 0.5)}
    assert len(iso_loss(table(whole)).axes) == 1 + 1
    few = dict(list(whole.items())[:4])
    assert iso_loss(table(few)) is None, "one ratio per number of experts per token is no map"
    of_width = {(e, 2, s): 1.0 + e + s for e in (4, 8) for s in (0.0, 0.5)}
    widths = [one for width in range(5) for one in table(of_width, hidden_size=width)]
    assert iso_loss(widths) is None and len(iso_loss(widths[:16]).axes) == 4 + 1


def test_the_loss_is_drawn_over_the_counts_that_vary_alone():
    varied = [variant(loss, active_parameters=1000, kept_parameters=1000 / loss) for loss in (2.0, 3.0)]
    axis, _ = loss_by_parameters(varied).axes
    assert axis.get_xlabel() == "thousand needed parameters"
    assert loss_by_parameters([varied[0], varied[0]]) is None


def test_levels_begin_at_the_least_loss_and_increase_even_if_all_are_equal():
    assert _levels([3.0, 1.0]) == pytest.approx([1 + 0.2 * step for step in range(11)])
    assert np.diff(_levels([2.0, 2.0])).min() > 0


@pytest.mark.parametrize(("number", "named"), [(6, 6), (7, 0)])
def test_up_to_six_variants_of_the_front_are_named_towards_the_middle(number, named):
    axis = Figure().add_subplot()
    variants = [
        variant(10.0 - index, name=f"v{index}", active_parameters=1000.0 * (index + 1)) for index in range(number)
    ]
    _scatter(axis, [*variants, variant(99.0, active_parameters=6500.0)], "active_parameters")
    assert len(axis.texts) == named
    if named:
        # The middle of 1,000 and 6,500 is 3,750: the names of those below it go to the right.
        assert [text.get_ha() for text in axis.texts] == ["left"] * 3 + ["right"] * 3
        assert [text.get_text() for text in axis.texts] == [f"v{index}" for index in range(6)]


def test_a_variant_is_named_by_its_choices_or_by_itself():
    assert _name(variant(name="x", choices=[("A=2", []), ("dense", [])])) == "A=2, dense"
    assert _name(variant(name="x")) == "x"


def test_nothing_is_left_beside_a_picture(tmp_path):
    rows = [
        {"finished": True, "variant": str(d), "settings": {"model.hidden_size": d}, "loss": 2.0, "hidden_size": d}
        | {"num_layers": 2, "num_experts": 4, "experts_per_token": 2, "sparsity": 0.0}
        | {"active_parameters": d, "kept_parameters": 5}
        for d in (8, 16)
    ]
    assert write_figures(grid_drawings(rows), tmp_path) == {
        "loss-by-parameters.png": "Validation loss by active parameters"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["loss-by-parameters.png"]


def test_a_legend_has_each_label_once_and_the_figure_grows_with_its_number_and_its_longest_label():
    figure = Figure(figsize=(5, 4))
    axes = [figure.add_subplot(1, 2, place + 1) for place in range(2)]
    for axis in axes:
        for label in ("one", "a label of some length"):
            axis.plot([0, 1], [0, 1], label=label, color="red" if axis is axes[0] else "blue")
    legend(figure, axes, "note")
    (drawn,) = figure.legends
    assert [text.get_text() for text in drawn.get_texts()] == ["one", "a label of some length"]
    assert {line.get_color() for line in drawn.get_lines()} == {"red"}, "the first panel's"
    assert (
        figure.get_figwidth() == pytest.approx(5 + 0.06 * len("a label of some length")) and figure.get_figheight() == 4
    )
    for index in range(30):
        axes[0].plot([0, 1], [0, 1], label=f"more {index}")
    legend(figure, axes)
    assert figure.get_figheight() == pytest.approx(0.9 + 0.17 * 32)
