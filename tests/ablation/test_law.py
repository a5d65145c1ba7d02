"""Scaling laws: the forms, the recovery of known constants, and the reported uncertainty."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qsparse_moe.ablation.law import certainty
from qsparse_moe.ablation.law import study as study_module
from qsparse_moe.ablation.law.certainty import (
    held_out_error,
    interval,
    largest_held_out_error,
    longest_held_out_error,
    resampled,
)
from qsparse_moe.ablation.law.fit import HUBER_DELTA, fit, rms, why_not
from qsparse_moe.ablation.law.forms import Design
from qsparse_moe.ablation.law.joint import ADDITIVE, JOINT, KEPT, LENGTH, PRODUCT
from qsparse_moe.ablation.law.observations import imagined, seed_spread
from qsparse_moe.ablation.law.optimum import GRID, Optimum, _band, _crossing, _vertex, find_optimum
from qsparse_moe.ablation.law.published import (
    EXPERT_SPARSITY,
    FINE_GRAINED,
    JOINT_MOE,
    PUBLISHED,
    PUBLISHED_OPTIMUM,
    Q_SPARSE,
)
from qsparse_moe.ablation.law.study import Choices, _best_s, printed_optimum, study
from tests.ablation.law_runs import observations_of

CONSTANTS = {
    "product": {"E": 1.0, "B": 0.2, "C": 0.7, "b": 0.6, "alpha": 0.3, "delta": 0.12, "beta": 0.15, "nu": 0.5},
    "kept": {"E": 1.0, "a": 0.9, "b": 0.6, "alpha": 0.3, "delta": 0.2, "beta": 0.1, "nu": 0.5},
    "additive": {"E": 1.0, "a": 0.9, "h": 0.3, "b": 0.6, "alpha": 0.3, "delta": 0.12, "beta": 0.3}
    | {"gamma": 0.4, "eta": 0.1, "nu": 0.5},
    "length": {"E": 1.0, "a": 0.9, "h": 0.3, "b": 1.6, "alpha": 0.3, "delta": 0.12, "beta": 0.3}
    | {"kappa": 0.2, "lambda": 0.8, "zeta": 0.05},
} | {form.name: dict(form.printed) for form in PUBLISHED}
FORMS = (*JOINT, *PUBLISHED)
# Models and tokens of the size that a law was fitted to.
SIZE = {form.name: {"scale": 1e3, "final_tokens": 2e10} for form in PUBLISHED}
for without_sparsity in (FINE_GRAINED, JOINT_MOE, EXPERT_SPARSITY):
    SIZE[without_sparsity.name] |= {"sparsities": (0.0,), "widths": (24, 48, 96, 192, 384, 768)}


def runs_of(form, **settings):
    return observations_of(form, CONSTANTS[form.name], **SIZE.get(form.name, {}) | settings)


def plainly(form, p):
    """The formulas of the papers and of docs/law.md, written out."""
    c = CONSTANTS[form.name]
    n, d, k, share, s, g = p.total, p.tokens, p.needed, p.expert_share, p.sparsity, p.granularity
    if form is Q_SPARSE:
        return c["E"] + (c["B"] + c["C"] * np.exp(c["beta"] / (1 - s))) / (n / 1e8) ** c["alpha"]
    if form is FINE_GRAINED:
        return c["c"] + (c["g"] / g ** c["gamma"] + c["a"]) / n ** c["alpha"] + c["b"] / d ** c["beta"]
    if form is JOINT_MOE:
        inverse = 1 / (1 / share - 1 + 1 / (1 / 2.0732 - 1 / 290.4521)) + 1 / 290.4521
        e = 1 / inverse
        first = c["a"] * e ** c["delta"] * p.active ** (c["alpha"] + c["gamma"] * np.log(e))
        return first + c["b"] * e ** c["omega"] * d ** (c["beta"] + c["zeta"] * np.log(e)) + c["c"]
    if form is EXPERT_SPARSITY:
        with_experts = c["c"] / share ** c["lambda"] + c["d"] / (share ** c["delta"] * n ** c["gamma"])
        return c["a"] / n ** c["alpha"] + c["b"] / d ** c["beta"] + with_experts + c["e"]
    if form is LENGTH:
        penalty = c["h"] * (np.exp(c["beta"] * s / (1 - s)) - 1) * (d / 1e6) ** c["kappa"]
        tokens = c["b"] * np.exp(-c["lambda"] * np.sqrt(d / 1e6)) / (d / 1e6) ** (c["zeta"] * np.log(n / 1e6))
        return c["E"] + c["a"] / ((n / 1e6) ** c["alpha"] * share ** c["delta"]) + penalty + tokens
    tokens = c["b"] / (d / 1e6) ** c["nu"]
    if form is PRODUCT:
        a_of_s = c["B"] + c["C"] * np.exp(c["beta"] / (1 - s))
        return c["E"] + a_of_s / ((n / 1e6) ** c["alpha"] * share ** c["delta"]) + tokens
    if form is KEPT:
        size = (k / 1e6) ** c["alpha"] * (n / k) ** c["delta"]
        return c["E"] + c["a"] * np.exp(c["beta"] * s / (1 - s)) / size + tokens
    penalty = c["h"] * (np.exp(c["beta"] * s / (1 - s)) - 1) / ((n / 1e6) ** c["gamma"] * share ** c["eta"])
    return c["E"] + c["a"] / ((n / 1e6) ** c["alpha"] * share ** c["delta"]) + penalty + tokens


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_is_its_formula(form):
    points = runs_of(form)
    np.testing.assert_allclose(form.loss(CONSTANTS[form.name], points), plainly(form, points), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_gradient_is_that_of_the_loss(form):
    points = runs_of(form)
    design = Design.of(form, points)
    theta = form.theta(CONSTANTS[form.name]) + np.random.default_rng(0).normal(0, 0.02, len(form.constants))
    log_loss, jacobian = design.log_loss_and_jacobian(theta)
    np.testing.assert_allclose(np.exp(log_loss), design.loss(theta), rtol=1e-12)
    for place, step in enumerate(1e-6 * np.eye(len(theta))):
        by_difference = (np.log(design.loss(theta + step)) - np.log(design.loss(theta - step))) / 2e-6
        np.testing.assert_allclose(jacobian[place], by_difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_without_noise_the_fit_recovers_the_constants_of_a_form(form):
    found = fit(form, runs_of(form))
    assert found.constants == pytest.approx(CONSTANTS[form.name], rel=1e-6)


# Absolute: the error of a constant from 48 runs with 0.3 % of noise, about three times its deviation over seeds.
WITHIN = {
    "product": {"alpha": 0.06, "delta": 0.03, "nu": 0.08, "E": 0.15},
    "kept": {"alpha": 0.06, "delta": 0.04, "beta": 0.02, "nu": 0.08, "E": 0.15},
    "additive": {"alpha": 0.06, "delta": 0.03, "gamma": 0.12, "eta": 0.1, "nu": 0.08, "E": 0.15},
}


@pytest.mark.parametrize(
    ("form", "wrong"), [(PRODUCT, KEPT), (KEPT, PRODUCT), (ADDITIVE, KEPT)], ids=lambda form: form.name
)
def test_with_noise_the_constants_and_the_form_are_found(form, wrong):
    points = runs_of(form, noise=0.003, seed=1)
    found = fit(form, points)
    for name, within in WITHIN[form.name].items():
        assert found.constants[name] == pytest.approx(CONSTANTS[form.name][name], abs=within), name
    error = held_out_error(found, points)
    assert error == pytest.approx(0.003, rel=0.15)
    assert held_out_error(fit(wrong, points), points) > 1.02 * error


def test_one_outlying_run_does_not_change_the_huber_fit():
    points = runs_of(KEPT, noise=0.002)
    wrong = replace(points, loss=np.where(points.run == 7, 1.5 * points.loss, points.loss))
    found, moved = fit(KEPT, points).constants, fit(KEPT, wrong).constants
    assert moved == pytest.approx(found, rel=0.05)
    assert HUBER_DELTA == 1e-3


def optimum(form, constants, **settings):
    settings = {"needed": 1e8, "expert_share": 1.0, "tolerance": 0.02} | settings
    return find_optimum(form, form.theta(constants), **settings)


def test_printed_constants_give_their_own_optimum_with_a_warning():
    printed = printed_optimum(0.02)
    assert printed["sparsity"] == pytest.approx(0.502, abs=5e-4)
    low, high = printed["rounding"]
    assert low < PUBLISHED_OPTIMUM["full precision"] < high and high - low > 0.1
    assert "give S* 50.2%, whereas the paper states 45.58%" in printed["warning"]
    found = optimum(Q_SPARSE, Q_SPARSE.printed)
    assert found.band[0] < 0.3 and found.band[1] > 0.65
    assert found.worse_than_dense_beyond == pytest.approx(0.72, abs=0.01)


def test_constants_that_round_to_the_printed_ones_reproduce_the_published_optimum():
    """Many constants round to the printed ones; with B and C as printed and this beta the optimum is the stated one."""
    unrounded = dict(Q_SPARSE.printed) | {"beta": 0.0547}
    assert {name: round(value, 2) for name, value in unrounded.items()} == Q_SPARSE.printed
    points = observations_of(Q_SPARSE, unrounded, **SIZE["q-sparse"], noise=0.0005)
    found = optimum(Q_SPARSE, fit(Q_SPARSE, points).constants)
    assert found.sparsity == pytest.approx(PUBLISHED_OPTIMUM["full precision"], abs=0.01)
    assert optimum(Q_SPARSE, unrounded).sparsity == pytest.approx(0.4558, abs=5e-4)


def test_optimum_is_the_least_of_the_loss_at_equal_kept_parameters():
    constants = CONSTANTS["kept"]
    # N/K is 4/(1−S): the loss is least where delta ln(1−S) + beta S/(1−S) is, at 1−S = beta/delta.
    found = optimum(KEPT, constants, expert_share=0.25)
    assert found.sparsity == pytest.approx(1 - 0.1 / 0.2, abs=1e-4)
    models = imagined(needed=1e8, expert_share=0.25, sparsity=np.array([0.0, found.sparsity, *found.band]))
    reducible = KEPT.loss(constants | {"E": 1e-30, "b": 1e-30}, models)
    assert found.dense_excess == pytest.approx(reducible[0] / reducible[1] - 1)
    assert reducible[2:] == pytest.approx(1.02 * reducible[1], rel=1e-3)
    np.testing.assert_allclose(models.active * 0.25, models.total * 0.25**2)


def test_an_optimum_at_an_edge_is_marked_as_such():
    found = optimum(KEPT, CONSTANTS["kept"] | {"beta": 0.3})
    assert (found.sparsity, found.at_edge, found.dense_excess) == (0.0, True, 0.0)


def test_optimum_of_the_additive_form_changes_with_the_experts():
    constants = CONSTANTS["additive"] | {"eta": 0.6}
    few, many = (optimum(ADDITIVE, constants, needed=1e6, expert_share=share).sparsity for share in (0.5, 0.1))
    assert many < few - 0.05


def test_optimum_of_a_form_whose_cost_of_s_grows_with_the_tokens_falls_with_them():
    form, constants = LENGTH, CONSTANTS["length"]
    short, long = (optimum(form, constants, needed=1e6, tokens=tokens).sparsity for tokens in (1e5, 1e9))
    assert long < short - 0.05
    # A cost that does not depend on the length has one optimum.
    constants = constants | {"kappa": 0.0}
    short, long = (optimum(form, constants, needed=1e6, tokens=tokens).sparsity for tokens in (1e5, 1e9))
    assert long == pytest.approx(short, abs=1e-9)


def test_sparse_ends_of_the_longest_runs_are_predicted_from_everything_else():
    points = runs_of(LENGTH)
    ends = (points.tokens == points.tokens.max()) & (points.sparsity > 0)
    shifted = replace(points, loss=np.where(ends, 1.1 * points.loss, points.loss))
    best = fit(LENGTH, points)
    assert longest_held_out_error(best, points) < 1e-4
    assert longest_held_out_error(best, shifted) == pytest.approx(np.log(1.1), rel=0.02)
    # Without dense runs, or with one length, nothing is left that could predict them.
    assert longest_held_out_error(best, points.where(points.sparsity == 0)) is None
    assert longest_held_out_error(best, points.final()) is None


def test_intervals_cover_the_true_constants_and_are_no_wider_than_needed():
    names, covered, widths, values = ("alpha", "delta", "beta"), [], [], []
    for seed in range(10):
        points = runs_of(KEPT, run_noise=0.004, seed=seed)
        best = fit(KEPT, points)
        again = resampled(best, points, number=30, seed=seed)
        ends = [interval(np.array([other.constants[name] for other in again]), 0.9) for name in names]
        covered += [low <= CONSTANTS["kept"][name] <= high for name, (low, high) in zip(names, ends, strict=True)]
        widths.append([high - low for low, high in ends])
        values.append([best.constants[name] for name in names])
    assert sum(covered) >= 23  # of 30, where 27 are expected
    # Of a normal variable nine in ten lie within 1.64 standard deviations on either side.
    needed = 2 * 1.64 * np.std(values, axis=0, ddof=1)
    assert np.all((np.mean(widths, axis=0) > 0.5 * needed) & (np.mean(widths, axis=0) < 2.5 * needed))


def test_points_of_one_run_are_resampled_together():
    """An outlying run is off at each of its points, so five points carry no more information than one."""
    points = runs_of(KEPT, run_noise=0.004)
    best = fit(KEPT, points)
    widths = []
    for run in (points.run, np.arange(len(points))):
        again = resampled(best, replace(points, run=run), number=60)
        low, high = interval(np.array([other.constants["delta"] for other in again]), 0.9)
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1]


def test_every_run_counts_as_one():
    points = runs_of(KEPT)
    fewer = points.where((points.run != 3) | (points.tokens == points.tokens.max()))
    assert fewer.run_weights.sum() == pytest.approx(points.num_runs)
    assert len(fewer.final()) == points.num_runs


def test_held_out_errors_reveal_what_the_fit_does_not():
    points = runs_of(PRODUCT)
    largest = points.backbone == points.backbone.max()
    shifted = replace(points, loss=np.where(largest, 1.1 * points.loss, points.loss))
    best = fit(PRODUCT, points)
    assert largest_held_out_error(best, points) < 1e-4
    assert largest_held_out_error(fit(PRODUCT, shifted), shifted) == pytest.approx(np.log(1.1), rel=0.02)
    alone = points.where(points.backbone == points.backbone.min())
    assert largest_held_out_error(best, alone) is None


def test_seeds_of_a_configuration_are_held_out_together_and_give_the_noise():
    points = runs_of(KEPT, run_noise=0.01, seeds=3)
    assert points.num_runs == 3 * len(np.unique(points.configuration))
    assert seed_spread(points) == pytest.approx(0.01, rel=0.2)
    assert seed_spread(runs_of(KEPT)) is None
    # One configuration that its twins would give away.
    odd = replace(points, loss=np.where(points.configuration == 5, 1.3 * points.loss, points.loss))
    error = held_out_error(fit(KEPT, odd), odd)
    assert error == pytest.approx(np.log(1.3) / np.sqrt(48), rel=0.2)


@pytest.mark.parametrize(
    ("form", "settings", "reason"),
    [
        (PRODUCT, {"sparsities": (0.5,)}, "S takes 1 value in the runs, and its constants need at least 3"),
        (PRODUCT, {"experts": ((8, 2),)}, "E/A takes 1 value in the runs, and its constants need at least 2"),
        (
            KEPT,
            {"experts": ((8, 2),), "widths": (64, 96), "sparsities": (0.0, 0.3, 0.5)},
            "it has 7 constants and there",
        ),
        (FINE_GRAINED, {"experts": ((8, 2), (4, 2))}, "G takes 2 values"),
    ],
)
def test_points_that_do_not_determine_the_constants_are_detected(form, settings, reason):
    assert why_not(form, runs_of(form, **settings)).startswith(reason)


def test_quantities_that_vary_together_are_detected():
    points = runs_of(Q_SPARSE)
    linked = points.where(np.isin(points.total, np.unique(points.total)[:4]))
    sparsity = 1 - 1 / (1 + 0.1 * np.log(linked.total / linked.total.min()))
    assert why_not(Q_SPARSE, linked.where(linked.run < 99)) is None
    assert "N, S vary together" in why_not(Q_SPARSE, replace(linked, sparsity=sparsity))


def test_a_resampled_run_counts_as_one_however_many_observations_it_has(monkeypatch):
    seen = []
    monkeypatch.setattr(certainty, "fit", lambda *_arguments, weights, near: seen.append(weights))
    runs = np.array([0, 0, 0, 0, 1, 1, 2])
    seven = imagined(needed=1e6, expert_share=0.5, sparsity=np.zeros(7))
    resampled(SimpleNamespace(form=None, theta=None), replace(seven, run=runs), number=20)
    by_run = np.array([[weights[runs == run].sum() for run in range(3)] for weights in seen])
    # Drawn three times with replacement: whole numbers that add up to 3, not always the same.
    assert by_run.sum(1) == pytest.approx(3) and by_run == pytest.approx(by_run.round())
    assert len({tuple(drawn) for drawn in by_run.round().tolist()}) > 3


def test_the_deviation_over_seeds_compares_only_runs_of_equal_tokens():
    four = imagined(needed=1e6, expert_share=0.5, sparsity=np.zeros(4))
    runs = replace(four, run=np.arange(4), tokens=np.array([1e9, 1e9, 2e9, 2e9]), loss=np.exp([1.2, 1.0, 0.3, 0.5]))
    # Each pair lies 0.1 around its mean: four squares of 0.01 over two degrees of freedom.
    assert seed_spread(runs) == pytest.approx((4 * 0.01 / 2) ** 0.5)


def test_ends_of_a_band_and_a_crossing_are_the_last_s_inside_and_the_first_outside():
    values = np.full(len(GRID), 9.0)
    values[:7] = [3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 2.0]
    assert _band(values, 2, 2.0) == (GRID[1], GRID[3]), "a loss at the tolerance is within it"
    assert _band(values, 2, 9.0) == (0.0, GRID[-1])
    assert _band(values, 2, 1.5) == (GRID[2], GRID[2])
    # As good as dense is not worse; what lies before the optimum does not count.
    assert _crossing(values, 2) == GRID[5] and _crossing(np.minimum(values, 3.0), 2) is None
    # The parabola through 3, 1, 2 at -1, 0, 1 is least at (3 - 2) / (2 (3 - 2 + 2)) of a step.
    assert _vertex(np.array([3.0, 1.0, 2.0]), 1) == pytest.approx(GRID[1] + (GRID[2] - GRID[1]) / 6)
    assert _vertex(np.array([1.0, 1.0, 1.0]), 1) == GRID[1]


def test_the_deviation_over_seeds_uses_the_last_evaluation_of_each_run_and_is_unknown_for_single_runs():
    five = imagined(needed=1e6, expert_share=0.5, sparsity=np.zeros(5))
    curves = replace(
        five,
        run=np.array([0, 0, 1, 1, 2]),
        configuration=np.array([0, 0, 0, 0, 1]),
        tokens=np.array([1e9, 2e9, 2e9, 1e9, 2e9]),
        loss=np.exp([5.0, 1.0, 1.2, 7.0, 3.0]),
    )
    assert curves.final().loss == pytest.approx(np.exp([1.0, 1.2, 3.0]))
    # Two logs 0.1 around their mean over one degree of freedom; the third run is alone.
    assert seed_spread(curves) == pytest.approx((2 * 0.01) ** 0.5)
    assert seed_spread(curves.where(curves.run > 0)) is None
    # A run counts as one: its observations share a weight of 1.
    assert curves.run_weights.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]


def test_a_form_needs_one_run_more_than_it_has_constants():
    points = runs_of(PRODUCT)
    runs = np.unique(points.run)[::5]
    eight, nine = (points.where(np.isin(points.run, runs[:number])) for number in (8, 9))
    assert eight.num_runs == len(PRODUCT.constants) == 8
    assert why_not(PRODUCT, eight) == "it has 8 constants and there are 8 runs; at least 9 are needed"
    assert why_not(PRODUCT, nine) is None


def test_an_optimum_comes_from_the_best_fit_and_its_intervals_and_edges_from_the_resamples(monkeypatch):
    def found(form, theta, **settings):
        return Optimum(theta, theta >= 0.9, (theta - 0.1, theta + 0.05), 0.0, None)

    monkeypatch.setattr(study_module, "find_optimum", found)
    fits = [SimpleNamespace(form=None, theta=theta) for theta in (0.95, 0.1, 0.3, 0.5, 0.9)]
    best = _best_s(fits[0], fits[1:], Choices(level=0.5), 1e6, 1e9, 0.25)
    assert (best.expert_share, best.found.sparsity) == (0.25, 0.95)
    # Quartiles of 0.1, 0.3, 0.5, and 0.9, by linear interpolation; one of the four is at an edge.
    assert best.interval == pytest.approx((0.25, 0.6))
    assert best.band_interval == pytest.approx((0.25 - 0.1, 0.6 + 0.05))
    assert best.at_edge_share == 0.25


def test_s_is_determined_at_the_geometric_mean_of_the_kept_parameters_unless_given(monkeypatch):
    monkeypatch.setattr(study_module, "_requested", lambda *_: ([], {}))
    two = replace(imagined(needed=1.0, expert_share=0.5, sparsity=np.zeros(2)), needed=np.array([1e4, 1e6]))
    runs = SimpleNamespace(observations=two)
    assert study(runs, unit="nats", choices=Choices()).needed == pytest.approx(1e5)
    assert study(runs, unit="nats", choices=Choices(needed=7.0)).needed == 7.0


def test_the_residual_of_a_law_has_the_same_weight_for_every_run():
    models = imagined(needed=1e6, expert_share=0.5, sparsity=np.zeros(4))
    observations = replace(models, run=np.array([0, 0, 0, 1]))
    # Run 0 has three evaluations with a residual of 0.3, run 1 has one with 0.1.
    assert rms(np.array([0.3, -0.3, 0.3, 0.1]), observations) == pytest.approx(0.05**0.5)
