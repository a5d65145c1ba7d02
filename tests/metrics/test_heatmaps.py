"""Heat maps: their values by hand, a fixed scale, pictures that differ where the values do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsparse_moe.metrics.heatmaps import HeatMap, Scale, _readable, heat_maps, scale_of
from qsparse_moe.sparsity.stats import SITE_FIELDS


def stats():
    made = {"router/routed_LE": torch.tensor([[6.0, 2.0], [4.0, 0.0]], dtype=torch.float64)}
    fields = dict.fromkeys(SITE_FIELDS, torch.zeros(2, 2, dtype=torch.float64))
    fields |= {"rows": made["router/routed_LE"], "nonzero": torch.tensor([[6.0, 4.0], [8.0, 0.0]], dtype=torch.float64)}
    fields |= {"energy": torch.tensor([[2.0, 4.0], [1.0, 0.0]]), "kept_energy": torch.tensor([[1.0, 3.0], [1.0, 0.0]])}
    made |= {f"sparsity/expert_hidden/{name}_LE": value for name, value in fields.items()}
    used = torch.tensor([[[True, False], [True, True]], [[True, True], [False, False]]])
    return made | {"sparsity/expert_hidden/used_LED": used}


def test_values_by_hand_with_nan_for_an_expert_without_a_token():
    maps = heat_maps(stats())
    nan = np.nan
    expected = {
        "load": [[1.5, 0.5], [2.0, 0.0]],
        "expert_hidden/kept_energy": [[0.5, 0.75], [1.0, nan]],
        "expert_hidden/zeros": [[0.5, 0.0], [0.0, nan]],
        "expert_hidden/unused_features": [[0.5, 0.0], [0.0, nan]],
    }
    assert maps.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(maps[name], values)


@pytest.mark.parametrize(
    "name", ["load", "expert_input/kept_energy", "expert_hidden/zeros", "expert_hidden/unused_features"]
)
def test_a_value_has_one_colour_in_every_step(name):
    heat_map = HeatMap(scale_of(name, 4), [1, 2], 4)
    values = np.linspace(0.5, 1.0, 8).reshape(2, 4)
    first = heat_map.draw(values)
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
    changed = values.copy()
    changed[1, 3] = np.nan
    second = heat_map.draw(changed)
    assert second.shape == first.shape
    different = (first != second).any(-1)
    assert 0 < different.mean() < 0.2  # one cell of eight, and no other
    assert np.array_equal(heat_map.draw(values), first)


@pytest.mark.parametrize("num_experts", [1, 2, 8, 64])
def test_an_even_load_is_white_and_an_expert_with_more_is_red_and_with_less_blue(num_experts):
    heat_map = HeatMap(scale_of("load", num_experts), [0], num_experts)
    even, more, less = (heat_map._image.cmap(heat_map._image.norm(value))[:3] for value in (1.0, 1.5, 0.5))
    assert min(even) > 0.96
    assert more[0] > more[2] + 0.1 and less[2] > less[0] + 0.1


def test_every_map_has_its_own_limits_colours_and_title():
    load = "Load: routed tokens over the layer's mean"
    for num_experts, high in ((1, 2.0), (2, 2.0), (3, 3.0), (4, 4.0), (64, 4.0)):
        assert scale_of("load", num_experts) == Scale(0.0, high, "RdBu_r", load, middle=1.0)
    assert [scale_of(f"expert_hidden/{name}", 8) for name in ("kept_energy", "zeros", "unused_features")] == [
        Scale(0.5, 1.0, "viridis", "Energy after the selection at expert hidden"),
        Scale(0.0, 1.0, "magma", "Fraction of zeros at expert hidden"),
        Scale(0.0, 1.0, "cividis_r", "Unused features at expert hidden"),
    ]


def test_cells_are_grey_without_a_value_and_have_the_end_of_the_scale_beyond_it():
    heat_map = HeatMap(Scale(0.0, 1.0, "gray", "a title"), [1, 3], 3)
    heat_map._font = None  # a number would cover the middle of its cell
    picture = heat_map.draw(np.array([[np.nan, 7.0, -2.0], [0.0, 1.0, np.inf]]))
    centres = [tuple(picture[round(y), round(x)]) for x, y in heat_map._centres]
    black, white, grey = (0, 0, 0), (255, 255, 255), (208, 208, 208)
    assert centres == [grey, white, black, black, white, grey]
    axes = heat_map._axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("expert", "layer", "a title")


def test_numbers_in_cells_have_two_decimals():
    heat_map = HeatMap(Scale(0, 1000, "gray", "test"), [0], 2)
    pictures = [heat_map.draw(np.array([[value, 0.5]])) for value in (0.11, 0.114, 0.12)]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_ticks_are_layer_and_expert_numbers_and_each_value_is_drawn_in_its_cell():
    heat_map = HeatMap(Scale(0, 1, "gray", "test"), [1, 3], 3)
    axes = heat_map._axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    plain = heat_map.draw(np.zeros((2, 3)))
    for row, expert in ((0, 0), (0, 1), (1, 2)):
        values = np.zeros((2, 3))
        values[row, expert] = 1.0
        ys, xs = (heat_map.draw(values) != plain).any(-1).nonzero()
        places = axes.transData.inverted().transform(np.stack((xs, plain.shape[0] - ys), -1))
        assert np.abs(places - [expert, row]).max() < 0.56
        assert len(ys) > 400


@pytest.mark.parametrize(("num_experts", "step"), [(32, 1), (33, 2), (64, 2), (65, 3)])
def test_at_most_32_experts_have_a_number(num_experts, step):
    axis = HeatMap(Scale(0.0, 1.0, "viridis", ""), [0], num_experts)._axes
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(e) for e in range(0, num_experts, step)]


def test_numbers_are_written_into_the_cells_of_their_values():
    scale = Scale(0, 1000, "gray", "test")  # the two values have one colour
    heat_map = HeatMap(scale, [1, 3], 3)
    first, second = np.full((2, 3), 0.1), np.full((2, 3), 0.1)
    second[0, 1] = 0.7
    ys, xs = (heat_map.draw(first) != heat_map.draw(second)).any(-1).nonzero()
    places = heat_map._axes.transData.inverted().transform(np.stack((xs, heat_map.draw(first).shape[0] - ys), -1))
    assert len(ys) and np.abs(places - [1, 0]).max() < 0.5


def test_many_experts_are_drawn_without_numbers_in_the_cells():
    picture = HeatMap(Scale(0, 4, "viridis", "load"), list(range(3)), 128).draw(np.ones((3, 128)))
    assert picture.shape[1] > 2000


@pytest.mark.parametrize(("layers", "labelled"), [(4, True), (5, False)])
def test_up_to_160_cells_have_numbers(layers, labelled):
    num_experts = 40 if labelled else 33  # 160 and 165 cells
    heat_map = HeatMap(Scale(0, 1000, "gray", "test"), list(range(layers)), num_experts)
    one, other = (heat_map.draw(np.full((layers, num_experts), value)) for value in (0.11, 0.77))
    assert (one != other).any() == labelled, "the two values have one colour"


def test_numbers_are_black_on_bright_colours_and_white_on_dark_ones():
    # Luminance 0.299 R + 0.587 G + 0.114 B: an orange of 0.534 is bright, the blue with as much green, 0.349, is dark.
    assert _readable((1.0, 0.4, 0.0, 1.0)) == "black"
    assert _readable((0.0, 0.4, 1.0, 1.0)) == "white"
    assert [_readable(end) for end in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))] == ["black", "white"]
