"""The values in the figures of a law, read back from what is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes

from qsparse_moe.ablation.law.figures import _fit, _iso_loss, _residuals, _sparsity
from qsparse_moe.ablation.law.fit import Fit
from qsparse_moe.ablation.law.joint import KEPT
from qsparse_moe.ablation.law.observations import imagined
from qsparse_moe.ablation.law.optimum import GRID, Optimum
from qsparse_moe.ablation.law.read import Runs
from qsparse_moe.ablation.law.study import BestS, Choices, FittedForm, Study
from tests.ablation.law_runs import observations_of

CONSTANTS = {"E": 1.0, "a": 0.9, "b": 0.6, "alpha": 0.3, "delta": 0.2, "beta": 0.1, "nu": 0.5}
SHARES = (0.5, 0.25, 0.0625)


def fit_of(**changes):
    return Fit(KEPT, KEPT.theta(CONSTANTS | changes), 0.0)


@pytest.fixture(scope="module")
def done():
    exact = observations_of(KEPT, CONSTANTS, widths=(64, 96))
    observations = replace(exact, loss=exact.loss * np.where(exact.run % 2, 1.02, 0.99))
    optima = tuple(
        BestS(share, Optimum(0.87 - share, False, (0.3 - share / 2, 0.7), 0.1, None), (0.4 - share / 2, 0.6), (0, 1), 0)
        for share in SHARES
    )
    resamples = tuple(fit_of(beta=beta) for beta in (0.05, 0.1, 0.3))
    found = FittedForm(fit_of(), resamples, {}, 0.0151, None, None, None, optima)
    choices = Choices(level=0.5, tolerance=0.02)
    return Study(Runs(observations, (), 0), "nats", choices, 2e6, {"kept": found}, {}, None)


def offsets(axes):
    return np.asarray(axes.collections[0].get_offsets())


def test_measured_losses_are_drawn_over_fitted_ones_and_coloured_by_s(done):
    observations, best = done.runs.observations, done.fitted["kept"]
    axes = _fit(done, best).axes[0]
    np.testing.assert_allclose(offsets(axes), np.stack([fit_of().loss(observations), observations.loss], 1))
    np.testing.assert_array_equal(axes.collections[0].get_array(), observations.sparsity)
    every = np.concatenate([fit_of().loss(observations), observations.loss])
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[every.min()] * 2, [every.max()] * 2])
    assert axes.get_title() == "Form kept: 24 runs, RMS error 1.51%"


def test_residuals_in_percent_are_drawn_over_size_tokens_experts_and_s(done):
    observations = done.runs.observations
    panels = _residuals(done, done.fitted["kept"]).axes
    percent = 100 * np.log(np.where(observations.run % 2, 1.02, 0.99))
    for axes, name, values in zip(
        panels,
        ("parameters N", "tokens D", "experts / experts per token, E/A", "activation sparsity S"),
        (observations.total, observations.tokens, 1 / observations.expert_share, observations.sparsity),
        strict=True,
    ):
        assert axes.get_xlabel() == name
        np.testing.assert_allclose(offsets(axes), np.stack([values, percent], 1), err_msg=name)
    assert [axes.get_xscale() for axes in panels] == ["log", "log", "log", "linear"]
    assert panels[2].get_xticks().tolist() == [2, 4, 16]


def test_the_change_of_the_reducible_loss_over_s_has_the_optimum_of_the_same_share_of_experts(done):
    axes, below = _sparsity(done).axes
    curve = axes.lines[0]
    # The runs end at 0.7, and the sparsest optimum of all shares lies at 0.87 - 1/16, within 0.15 of that.
    grid = GRID[: np.searchsorted(GRID, 0.85, side="right")]
    np.testing.assert_allclose(curve.get_xdata(), grid)
    size = ((1 - grid) ** CONSTANTS["delta"]) * np.exp(CONSTANTS["beta"] * grid / (1 - grid))
    np.testing.assert_allclose(curve.get_ydata(), 100 * (size - 1), atol=1e-9)
    # Of the three resamples the quartiles lie half way to the outer ones.
    (path,) = axes.collections[0].get_paths()
    at_end = sorted(y for x, y in path.vertices if x == grid[-1])
    size = [(0.15**0.2) * np.exp(beta * 0.85 / 0.15) for beta in (0.05, 0.1, 0.3)]
    between = [100 * (np.mean(pair) - 1) for pair in (size[:2], size[1:])]
    assert [at_end[0], at_end[-1]] == pytest.approx(between, rel=1e-3)
    # E/A of 4 is in the middle of the three; its A/E is 1/4.
    assert axes.get_title() == "2,000,000 needed parameters, 20,000,000 tokens, A/E = 0.25"
    band, interval, best = below.lines[:3]
    assert band.get_xdata() == pytest.approx((0.3 - 0.125, 0.7)) and interval.get_xdata() == pytest.approx((0.275, 0.6))
    assert best.get_xdata() == pytest.approx([0.87 - 0.25])
    assert below.get_title() == "S*: best fit; 50% interval (thick); loss within 2.0% (thin)"
    assert below.lines[3].get_xdata()[0] == 0.7


def test_an_optimum_far_beyond_the_runs_is_on_the_axis(done):
    far = replace(done.fitted["kept"].optima[0], found=Optimum(0.93, False, (0.2, 0.95), 0.1, None))
    found = replace(done.fitted["kept"], optima=(replace(far, expert_share=None),))
    axes, below = _sparsity(replace(done, fitted={"kept": found})).axes
    assert axes.get_xlim()[1] == pytest.approx(0.93) and below.lines[2].get_xdata() == pytest.approx([0.93])


def test_the_map_of_a_law_has_s_as_rows_and_experts_as_columns_at_the_size_and_the_most_tokens_of_the_study(
    done, monkeypatch
):
    drawn = []
    contourf = Axes.contourf

    def recorded(self, *values, **settings):
        drawn.extend(values)
        return contourf(self, *values, **settings)

    monkeypatch.setattr(Axes, "contourf", recorded)
    axes = _iso_loss(done, done.fitted["kept"]).axes[0]
    ratios, grid, losses = drawn
    assert (ratios[0], ratios[-1], grid[0], grid[-1]) == pytest.approx((2, 16, 0, 0.7))
    for row, column in ((0, 0), (40, 59), (79, 13)):
        model = imagined(needed=2e6, expert_share=1 / ratios[column], sparsity=grid[[row]], tokens=2e7)
        assert losses[row, column] == pytest.approx(fit_of().loss(model)[0])
    observations = done.runs.observations
    dots = axes.lines[-1]
    np.testing.assert_allclose(dots.get_xydata(), np.stack([1 / observations.expert_share, observations.sparsity], 1))
    assert axes.get_title() == "kept: 2,000,000 needed parameters, 20,000,000 tokens; dots: runs"
