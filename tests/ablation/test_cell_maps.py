"""Heat maps of layers by experts: their scale, what is written and hatched in them, and their ticks."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure

from qsparse_moe.ablation.cell_maps import CellMap, _label_experts, _short, draw_maps, scale_over


def cell_map(change_LE, noise_LE=None, layers=None):
    change_LE = np.asarray(change_LE, float)
    noise_LE = np.zeros(change_LE.shape, bool) if noise_LE is None else np.asarray(noise_LE, bool)
    return CellMap("title", tuple(range(len(change_LE))) if layers is None else layers, change_LE, noise_LE)


def drawn(*maps, noise=None, note=""):
    scale = scale_over(np.concatenate([one.change_LE.ravel() for one in maps]))
    return draw_maps(maps, scale, title="title", missing="missing", noise=noise, note=note)


def test_a_scale_is_linear_up_to_thirty_times_the_median_of_what_is_not_zero():
    linear, beyond = scale_over([0.001, 0.001, -0.03]), scale_over([0.001, 0.001, -0.0301, 0.0, 0.0, 0.0, 0.0])
    assert type(linear) is Normalize and (linear.vmin, linear.vmax) == pytest.approx((-30.0, 30.0))
    assert isinstance(beyond, SymLogNorm) and (beyond.vmin, beyond.vmax) == pytest.approx((-30.1, 30.1))
    assert beyond.linthresh == 1.0 and scale_over([0.005, 0.005, 1.0]).linthresh == 1.0, "the decade below the median"
    # A mean would follow the largest.
    assert isinstance(scale_over([0.001, 0.001, 0.001, float("nan"), 1.0, float("inf")]), SymLogNorm)
    empty = scale_over([0.0, float("nan")])
    assert (empty.vmin, empty.vmax) == (-1e-9, 1e-9)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.004, "≈0"),
        (-0.0049, "≈0"),
        (0.005, "+0.005"),
        (-0.123, "-0.12"),
        (12.3, "+12"),
        (99.4, "+99"),
        (99.5, "+100"),
        (-1234.5, "-1234"),
    ],
)
def test_a_value_has_two_digits_or_is_a_whole_number(value, text):
    assert _short(value) == text


def test_values_are_written_into_their_cells_bold_unless_they_are_noise_and_white_at_both_ends_of_the_colours():
    figure = drawn(cell_map([[0.001, -0.1, np.nan], [0.1, 0.02, 0.01]], [[0, 0, 0], [0, 1, 0]]), noise="criterion")
    axis = figure.axes[0]
    found = {(t.get_position()[1], t.get_position()[0]): t for t in axis.texts}
    assert {place: t.get_text() for place, t in found.items()} == {
        (0, 0): "+1",
        (0, 1): "-100",
        (1, 0): "+100",
        (1, 1): "+20",
        (1, 2): "+10",
    }
    assert {place: t.get_color() for place, t in found.items()} == {
        (0, 0): "black",
        (0, 1): "white",
        (1, 0): "white",
        (1, 1): "0.35",
        (1, 2): "black",
    }
    assert [place for place, t in found.items() if t.get_weight() == "normal"] == [(1, 1)]
    np.testing.assert_allclose(np.ma.filled(axis.images[0].get_array(), 0), [[1, -100, 0], [100, 20, 10]])
    (patch,) = axis.patches
    assert (patch.get_xy(), patch.get_width(), patch.get_height()) == ((0.5, 0.5), 1, 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["criterion", "missing"]


def test_noise_at_the_ends_of_the_colours_is_grey_as_well():
    axis = drawn(cell_map([[0.1, -0.1]], [[1, 0]])).axes[0]
    assert [text.get_color() for text in axis.texts] == ["0.35", "white"]


def test_a_legend_names_what_any_panel_has_and_is_left_out_if_none_has_it():
    whole, part = cell_map([[0.1, 0.2]]), cell_map([[0.1, np.nan]])
    assert drawn(whole).legends == []
    assert [text.get_text() for text in drawn(whole, part).legends[0].get_texts()] == ["missing"]
    assert drawn(whole, note="a note").get_suptitle() == "title\na note" and drawn(whole).get_suptitle() == "title"


@pytest.mark.parametrize(("experts", "written"), [(16, True), (17, False)])
def test_up_to_160_cells_have_their_value_written(experts, written):
    axis = drawn(cell_map(np.full((10, experts), 0.1))).axes[0]
    assert len(axis.texts) == (10 * experts if written else 0)


@pytest.mark.parametrize(("number", "step"), [(16, 1), (17, 2), (32, 2), (33, 3)])
def test_at_most_sixteen_layers_and_experts_are_labelled_by_their_numbers(number, step):
    layers = tuple(range(100, 100 + number))
    axis = drawn(cell_map(np.zeros((number, number)), layers=layers)).axes[0]
    assert axis.get_yticks().tolist() == axis.get_xticks().tolist() == list(range(0, number, step))
    assert [label.get_text() for label in axis.get_yticklabels()] == [str(n) for n in layers[::step]]
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(n) for n in range(0, number, step)]


def test_a_site_without_experts_has_no_ticks_for_them():
    axis = Figure().add_subplot()
    _label_experts(axis, 1)
    assert axis.get_xticks().tolist() == [] and axis.get_xlabel() == ""
    _label_experts(axis, 2)
    assert axis.get_xticks().tolist() == [0, 1] and axis.get_xlabel() == "expert"


@pytest.mark.parametrize(("panels", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 3), (7, 3, 3)])
def test_panels_are_in_lines_of_three(panels, rows, columns):
    figure = drawn(*[cell_map([[0.1, 0.2]])] * panels)
    places = [axis.get_subplotspec() for axis in figure.axes[:panels]]
    assert {(place.get_gridspec().nrows, place.get_gridspec().ncols) for place in places} == {(rows, columns)}
    assert [place.num1 for place in places] == list(range(panels))
