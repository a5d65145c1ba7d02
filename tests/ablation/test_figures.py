"""The figures for which a grid has the axes, and their contents."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import imread

from qsparse_moe.ablation.cell_maps import scale_over
from qsparse_moe.ablation.grid.expert_figures import differences, expert_maps
from qsparse_moe.ablation.grid.figures import grid_drawings, loss_by_parameters, pareto_front, write_figures
from qsparse_moe.ablation.grid.panels import split_by
from qsparse_moe.ablation.grid.scan_figures import _change, loss_by_cell, loss_by_sparsity
from qsparse_moe.ablation.grid.variants import VariantResult, variant_results
from qsparse_moe.ablation.law.figures import iso_levels


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
    assert list(write_figures(grid_drawings(joint()), tmp_path)) == [
        "loss-by-sparsity.png",
        "loss-by-parameters.png",
        "iso-loss.png",
    ]
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
    assert list(write_figures(grid_drawings(rows), tmp_path)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


def test_lines_are_distinguished_by_what_varies_in_their_panel_and_panels_with_the_same_lines_share_a_legend():
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
    figure = loss_by_sparsity(variant_results(rows))
    assert [axis.get_legend() for axis in figure.axes] == [None, None]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["E=4, A=2, steps 80", "E=4, A=2, steps 160"]
    alone = loss_by_sparsity(variant_results(rows[:4]))
    (legend,) = alone.legends
    assert alone.axes[0].get_legend() is None, "a legend stands beside the panel, where it covers nothing"
    assert [text.get_text() for text in legend.get_texts()] == ["E=4, A=2, steps 80", "E=4, A=2, steps 160"]


@pytest.mark.parametrize(("largest", "scale"), [(4_000, "linear"), (40_000, "log")])
def test_costs_far_apart_are_drawn_on_a_logarithmic_axis(largest, scale):
    rows = [row({"model.hidden_size": n}, 2.0, active_parameters=n, kept_parameters=n) for n in (1_000, largest)]
    assert {axis.get_xscale() for axis in loss_by_parameters(variant_results(rows)).axes[:2]} == {scale}


@pytest.mark.parametrize("kind", ["flat", "nearly flat", "steep at one end"])
def test_levels_of_a_map_increase_and_can_be_drawn_whatever_the_law(kind):
    column = {"flat": np.full(80, 3.0), "nearly flat": 3.0 + 1e-12 * np.arange(80), "steep at one end": None}[kind]
    losses = np.tile((3.0 + np.linspace(0, 1, 80) ** 30 if column is None else column)[:, None], 60)
    levels = iso_levels(losses)
    assert (np.diff(levels) > 0).all()
    axis = Figure().add_subplot()
    axis.contourf(losses, levels=levels, norm=BoundaryNorm(levels, 256))
    if column is None:
        assert (levels < 3.01).sum() > 6, "most lines are where most of the map is"


def test_the_pareto_front_contains_the_points_that_no_other_point_beats():
    points = [
        VariantResult({"cost": cost}, loss, 0.0) for cost, loss in [(1, 3.0), (2, 2.0), (2, 2.5), (3, 2.2), (4, 1.0)]
    ]
    assert [(p.record["cost"], p.loss) for p in pareto_front(points, "cost")] == [(1, 3.0), (2, 2.0), (4, 1.0)]


def test_the_pareto_front_contains_the_cheaper_of_equal_losses_and_the_better_of_equal_costs_in_any_order():
    points = [
        VariantResult({"cost": cost}, loss, 0.0) for cost, loss in [(3, 2.0), (1, 3.0), (2, 2.5), (2, 2.0), (1, 4.0)]
    ]
    for order in (points, points[::-1]):
        assert [(p.record["cost"], p.loss) for p in pareto_front(order, "cost")] == [(1, 3.0), (2, 2.0)]


def place_row(variant, loss, cells, *, seed=0, settings=None, choices=()):
    """A row of a grid that changes S at expert_hidden of 2 layers of 3 experts; ``cells`` is by (layer, expert)."""
    entries = []
    for layer in (0, 1):
        values = [cells.get((layer, expert), 0.0) for expert in range(3)]
        for value in dict.fromkeys(values):
            experts = [e for e in range(3) if values[e] == value]
            entries.append((layer, "expert_hidden", None if len(experts) == 3 else experts, value))
    own = {"model.sparsity.overrides": [{"sparsity": 0.5}]} if settings is None else settings
    sparsity = sum(cells.values()) / 60
    return row(own, loss, sparsity=sparsity, kept_parameters=1000 - sparsity) | {
        "variant": variant,
        "seed": seed,
        "choices": list(choices) or [(variant, ["model.sparsity.overrides"])],
        "varied_sparsity": entries,
    }


def one_by_one(seeds):
    """Seeds move all runs alike by 0.5; layer 0, expert 1 costs 0.1 and all else scatters within 0.001."""
    rows = []
    for seed in seeds:
        noise = iter(0.001 * np.random.default_rng(seed).uniform(-1, 1, 7))
        rows.append(place_row("dense", 2.0 + 0.5 * seed + next(noise), {}, seed=seed))
        for layer in (0, 1):
            for expert in range(3):
                loss = 2.0 + 0.5 * seed + next(noise) + 0.1 * ((layer, expert) == (0, 1))
                rows.append(place_row(f"l{layer}e{expert}", loss, {(layer, expert): 0.9}, seed=seed))
    return rows


def texts(axis):
    return {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axis.texts}


def hatched(axis):
    return {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in axis.patches if p.get_hatch()}


def test_a_map_of_single_experts_shows_changes_from_the_first_point_and_hatches_those_within_seed_noise():
    figure = expert_maps(variant_results(one_by_one((0, 1, 2))))
    axis, bar = figure.axes
    assert axis.get_title() == "expert_hidden, S=0.9" and "nats per token" in bar.get_ylabel()
    changes = np.asarray(axis.images[0].get_array())
    assert changes.shape == (2, 3) and changes[0, 1] == pytest.approx(100, abs=2)
    assert np.abs(np.delete(changes.ravel(), 1)).max() < 2
    assert texts(axis)[0, 1] == f"{changes[0, 1]:+.0f}"
    assert (0, 1) not in hatched(axis) and len(hatched(axis)) >= 4
    assert "mean of 3 seeds" in figure.get_suptitle() and "against dense" in figure.get_suptitle()
    (legend,) = figure.legends
    assert "noise" in legend.get_texts()[0].get_text()


def test_a_map_of_one_seed_says_that_the_deviation_over_seeds_is_unknown_and_marks_nothing():
    figure = expert_maps(variant_results(one_by_one((1,))))
    assert "one seed: no spread known" in figure.get_suptitle() and not hatched(figure.axes[0])
    assert np.asarray(figure.axes[0].images[0].get_array())[0, 1] == pytest.approx(100, abs=2)
    assert figure.legends == []


def test_the_interval_of_a_difference_treats_seeds_as_blocks():
    losses = np.array([[2.0, 2.5, 3.1], [2.1, 2.7, 3.0], [1.9, 2.6, 3.3]])
    points = [VariantResult({}, float(own.mean()), 0.0, dict(enumerate(own.tolist()))) for own in losses]
    change, half = differences(points)
    np.testing.assert_allclose(change, [0.2 / 3, 0.2 / 3])
    # Residuals around row and column means, by hand: 4 degrees of freedom, t = 2.776.
    residuals = losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()
    assert half == pytest.approx(2.7764 * (2 * (residuals**2).sum() / 4 / 3) ** 0.5, rel=1e-4)
    shifted = [VariantResult({}, p.loss, 0.0, {s: v + 10 * s for s, v in p.by_seed.items()}) for p in points]
    assert differences(shifted)[1] == pytest.approx(half), "what a seed does to all points alike does not count"
    assert differences([p._replace(by_seed={0: p.by_seed[0]}) for p in points])[1] is None


def test_a_point_that_changes_two_experts_or_another_setting_is_on_no_map():
    rows = one_by_one((0,))[:2]
    both = place_row("both", 2.0, {(0, 0): 0.9, (1, 0): 0.9})
    other = place_row("other", 2.0, {(1, 1): 0.9}, settings={"model.moe.router": "x"})
    assert expert_maps(variant_results([*rows, both, other])) is None
    assert expert_maps(variant_results([*rows, both, place_row("more", 2.0, {(1, 2): 0.9})])) is not None


def scan(seeds=(0,)):
    path = "model.sparsity.overrides.0.sparsity"
    return [
        place_row(
            f"sparsity-{s}",
            2.0 + s + seed,
            {(1, 0): s, (1, 1): s},
            seed=seed,
            settings={path: s},
            choices=[(f"S={s}", [path])],
        )
        for s in (0.9, 0.0, 0.5)
        for seed in seeds
    ]


def test_a_scan_of_the_s_of_one_site_is_one_line_over_that_s_and_names_the_site():
    figure = loss_by_sparsity(variant_results(scan()))
    (axis,) = figure.axes
    (line,) = [one for one in axis.lines if len(one.get_xdata()) > 1]
    assert list(line.get_xdata()) == [0.0, 0.5, 0.9] and list(line.get_ydata()) == [2.0, 2.5, 2.9]
    assert axis.get_xlabel() == "S at layer 1 experts 0-1 expert_hidden"
    assert figure.legends[0].get_title().get_text() == "one seed: no spread known"
    assert "over 2 seeds" in loss_by_sparsity(variant_results(scan((0, 1)))).legends[0].get_title().get_text()


def places():
    rows = [place_row("dense", 2.0 + seed, {}, seed=seed) for seed in (0, 1)]
    for seed in (0, 1):
        for s in (0.9, 0.5):
            rows.append(place_row(f"a{s}", 2.0 + seed + s * (1 + seed), {(0, 2): s}, seed=seed))
            rows.append(place_row(f"b{s}", 2.0 + seed - s, {(1, 0): s, (1, 1): s}, seed=seed))
    return variant_results(rows)


def test_sites_that_are_scanned_together_have_one_line_each_from_the_first_point():
    assert loss_by_sparsity(places()) is None, "their mean S is no axis"
    figure = loss_by_cell(places())
    (axis,) = figure.axes
    lines = {own.get_label(): own[0] for own in axis.containers}
    assert list(lines) == ["layer 0 expert 2 expert_hidden", "layer 1 experts 0-1 expert_hidden"]
    for (label, line), slope in zip(lines.items(), (1.5, -1.0), strict=True):
        np.testing.assert_allclose(line.get_xdata(orig=False), [0.0, 0.5, 0.9], atol=0.01, err_msg=label)
        np.testing.assert_allclose(line.get_ydata(orig=False), [0.0, slope * 0.5, slope * 0.9], err_msg=label)
    assert "change" in axis.get_ylabel()


@pytest.mark.parametrize("make", [lambda: loss_by_cell(places()), lambda: loss_by_sparsity(variant_results(scan()))])
def test_no_legend_covers_the_data_or_contains_python_syntax(make):
    figure = make()
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
    assert box.x1 <= figure.bbox.x1 and box.y0 >= figure.bbox.y0, "all of it is on the picture"
    assert not any(set("{}[]'") & set(text.get_text()) for text in legend.get_texts())


def test_lines_of_named_variants_are_labelled_with_their_names_and_never_with_a_dictionary():
    paths = ["model.sparsity.schedule.shape", "data.sources"]
    rows = [
        row({"model.sparsity.default": s} | own, 3.0 - s, sparsity=s)
        | {"choices": [(name, paths), (f"S={s}", ["model.sparsity.default"])], "variant": f"{name}-S{s}"}
        for name, own in (("plain", {}), ("mine", {"data.sources": [{"kind": "text", "path": "x"}]}))
        for s in (0.0, 0.5)
    ]
    (legend,) = loss_by_sparsity(variant_results(rows)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["E=4, A=2, plain", "E=4, A=2, mine"]


def test_changes_of_different_magnitudes_have_a_scale_that_is_logarithmic_away_from_0():
    assert type(scale_over([0.001, -0.002, 0.004])) is Normalize
    far = scale_over([1e-5, 2e-5, -3e-5, 0.1, float("nan")])
    assert isinstance(far, SymLogNorm) and (far.vmin, far.vmax) == (-100.0, 100.0)
    assert float(far(0.0)) == pytest.approx(0.5)
    assert scale_over([0.0]).vmax > 0


def test_the_deviation_of_a_variant_is_the_sample_standard_deviation_over_its_seeds():
    (found, alone) = variant_results([row({}, 1.0), row({"a": 1}, 5.0), row({}, 3.0), row({}, None)])
    # Squares of 1 and 1 around the mean of 2, over one degree of freedom.
    assert (found.loss, found.spread) == (2.0, pytest.approx(2**0.5))
    assert (alone.loss, alone.spread) == (5.0, 0.0)


def test_a_change_of_zero_is_noise_even_if_seeds_do_not_differ():
    rows = [row | {"loss": 2.0} for row in one_by_one((0, 1))]
    axis = expert_maps(variant_results(rows)).axes[0]
    assert hatched(axis) == {(layer, expert) for layer in (0, 1) for expert in range(3)}


def test_a_change_is_the_mean_over_common_seeds_with_their_sample_standard_deviation():
    base = VariantResult({}, 1.5, 0.0, {0: 1.0, 1: 2.0, 2: 9.0})
    both = VariantResult({}, 2.1, 0.0, {0: 1.5, 1: 2.75, 7: 0.0})
    # Changes of 0.5 and 0.75: squares of 0.125 twice over one degree of freedom.
    assert _change(base, both) == (0.625, pytest.approx((2 * 0.125**2) ** 0.5))
    assert _change(base, VariantResult({}, 4.0, 0.0, {2: 8.0})) == (-1.0, 0.0)
    assert _change(base, VariantResult({}, 4.0, 0.0, {5: 8.0})) == (2.5, 0.0), "no seed in common: the means alone"


def test_panels_are_named_by_the_sizes_that_vary():
    def variants(*sizes):
        return [VariantResult({"hidden_size": d, "num_layers": n, "experts_per_token": 2}, 1.0, 0.0) for d, n in sizes]

    names = ("hidden_size", "num_layers", "experts_per_token")
    assert list(split_by(variants((64, 2), (64, 2)), names)) == [""]
    assert list(split_by(variants((64, 2), (32, 2), (64, 2)), names)) == ["D=64", "D=32"]
    several = split_by(variants((64, 2), (32, 2), (32, 4)), names)
    assert {title: len(own) for title, own in several.items()} == {"D=64, L=2": 1, "D=32, L=2": 1, "D=32, L=4": 1}
