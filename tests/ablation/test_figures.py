"""Which figures the rows of a grid have the axes for, and what they show."""

import numpy as np
import pytest
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.image import imread

from qsparse_moe.ablation.figures import (
    Point,
    draw_figures,
    loss_by_parameters,
    loss_by_sparsity,
    pareto_front,
    points_of,
)
from qsparse_moe.ablation.law_figures import iso_levels


def row(settings, loss, **shape):
    known = {"hidden_size": 32, "num_layers": 2, "num_experts": 4, "experts_per_token": 2, "sparsity": 0.0}
    cost = {"active_parameters": 1000, "kept_parameters": 1000.0}
    name = "-".join(str(value) for value in settings.values()) or "base"
    return known | cost | shape | {"variant": name, "settings": settings, "loss": loss, "finished": loss is not None}


def joint():
    return [
        row(
            {"model.moe.num_experts": experts, "model.sparsity.default": sparsity},
            3.0 - 0.02 * experts + 0.3 * sparsity + 0.01 * seed,
            num_experts=experts,
            sparsity=sparsity,
            kept_parameters=1000.0 * (1 - sparsity),
        )
        for experts in (4, 8, 16)
        for sparsity in (0.0, 0.3, 0.5, 0.7)
        for seed in (0, 1)
    ]


def test_a_grid_of_experts_and_sparsity_has_every_figure(tmp_path):
    assert list(draw_figures(joint(), tmp_path)) == ["loss-by-sparsity.png", "loss-by-parameters.png", "iso-loss.png"]
    for path in tmp_path.iterdir():
        assert path.suffix == ".png" and imread(path)[..., :3].std() > 0.05, "nothing is drawn"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([row({"model.moe.router": name}, 2.0) for name in ("a", "b")], []),
        ([row({"model.sparsity.default": s}, 2.0, sparsity=s) for s in (0, 0.5)], ["loss-by-sparsity.png"]),
        ([row({"model.sparsity.default": s}, None, sparsity=s) for s in (0, 0.5)], []),
        # Different sites: their mean S is no axis.
        ([row({f"model.sparsity.sites.{site}": 0.5}, 2.0, sparsity=s) for site, s in (("a", 0.1), ("b", 0.2))], []),
        ([row({"model.hidden_size": d}, 2.0, active_parameters=d) for d in (8, 16)], ["loss-by-parameters.png"]),
        (joint()[:-2], ["loss-by-sparsity.png", "loss-by-parameters.png"]),
    ],
)
def test_a_figure_is_drawn_only_where_the_grid_has_its_axes(tmp_path, rows, expected):
    assert list(draw_figures(rows, tmp_path)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


def test_lines_are_told_apart_by_what_varies_in_their_panel_and_named_once_beside_panels_that_have_the_same():
    rows = [
        row(
            {"training.steps": steps, "model.init_std": 1 / width, "model.sparsity.default": s},
            3.0 - s,
            hidden_size=width,
            sparsity=s,
        )
        for width in (32, 64)
        for steps in (80, 160)
        for s in (0.0, 0.5)
    ]
    figure = loss_by_sparsity(points_of(rows))
    assert [axis.get_legend() for axis in figure.axes] == [None, None]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["E 4, A 2, steps 80", "E 4, A 2, steps 160"]
    alone = loss_by_sparsity(points_of(rows[:4]))
    assert alone.legends == [] and alone.axes[0].get_legend() is not None


@pytest.mark.parametrize(("largest", "scale"), [(4_000, "linear"), (40_000, "log")])
def test_costs_far_apart_stand_on_a_logarithmic_axis(largest, scale):
    rows = [row({"model.hidden_size": n}, 2.0, active_parameters=n, kept_parameters=n) for n in (1_000, largest)]
    assert {axis.get_xscale() for axis in loss_by_parameters(points_of(rows)).axes[:2]} == {scale}


@pytest.mark.parametrize("kind", ["flat", "nearly flat", "steep at one end"])
def test_levels_of_a_map_rise_and_can_be_drawn_whatever_the_law(kind):
    column = {"flat": np.full(80, 3.0), "nearly flat": 3.0 + 1e-12 * np.arange(80), "steep at one end": None}[kind]
    losses = np.tile((3.0 + np.linspace(0, 1, 80) ** 30 if column is None else column)[:, None], 60)
    levels = iso_levels(losses)
    assert (np.diff(levels) > 0).all()
    axis = Figure().add_subplot()
    axis.contourf(losses, levels=levels, norm=BoundaryNorm(levels, 256))
    if column is None:
        assert (levels < 3.01).sum() > 6, "most lines are where most of the map is"


def test_the_pareto_front_holds_what_no_other_point_beats():
    points = [Point({"cost": cost}, loss, 0.0) for cost, loss in [(1, 3.0), (2, 2.0), (2, 2.5), (3, 2.2), (4, 1.0)]]
    assert [(p.row["cost"], p.loss) for p in pareto_front(points, "cost")] == [(1, 3.0), (2, 2.0), (4, 1.0)]
