"""The steps of a fit: objective, starts, limits, and certainty, each with the others replaced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qsparse_moe.ablation.law import certainty
from qsparse_moe.ablation.law import fit as fit_module
from qsparse_moe.ablation.law.certainty import _folds, held_out_error, interval, largest_held_out_error, resampled
from qsparse_moe.ablation.law.fit import Fit, _best_starts, _grid, _objective, why_not
from qsparse_moe.ablation.law.forms import Design
from qsparse_moe.ablation.law.joint import JOINT, KEPT
from qsparse_moe.ablation.law.observations import imagined
from qsparse_moe.ablation.law.optimum import GRID, find_optimum
from qsparse_moe.ablation.law.published import JOINT_MOE, PUBLISHED, Q_SPARSE
from qsparse_moe.errors import ConfigError
from tests.ablation.law_runs import observations_of
from tests.ablation.test_law_study import CONSTANTS, runs_of


def test_resamples_and_folds_follow_their_seed_and_each_fit_is_announced(monkeypatch):
    drawn, calls = {}, []
    for seed in (0, 1):
        seen = drawn.setdefault(seed, [])
        monkeypatch.setattr(
            certainty, "fit", lambda *_arguments, weights, near, seen=seen: seen.append(weights.tolist())
        )
        best = SimpleNamespace(form=None, theta=None)
        resampled(best, runs_of(6), number=4, seed=seed, notify=lambda: calls.append(1))
    assert len(calls) == 8 and drawn[0] != drawn[1]
    held = {seed: [part.tolist() for part in _folds(runs_of(13), seed)] for seed in (0, 1)}
    assert held[0] != held[1]
    # Five folds, each configuration in one of them; with fewer configurations each is left out alone.
    assert np.sum(held[0], axis=0).tolist() == [1] * 13 and sorted(map(sum, held[0])) == [2, 2, 3, 3, 3]
    assert [part.sum() for part in _folds(runs_of(3), 0)] == [1, 1, 1]
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5.0, 95.0))


def test_runs_are_predicted_by_the_better_of_two_fits_without_them_if_those_determine_the_constants(monkeypatch):
    observations = observations_of(KEPT, CONSTANTS, widths=(64, 96))
    state, seen = {"reason": None, "worse": True}, []

    def refit(form, given, near=None):
        seen.append(given)
        # Which of the two starts ends in a local minimum differs.
        off = 0.1 if (near is None) == state["worse"] else 0.0
        return Fit(KEPT, KEPT.theta({name: value * np.exp(off) for name, value in CONSTANTS.items()}), off)

    monkeypatch.setattr(certainty, "fit", refit)
    monkeypatch.setattr(certainty, "why_not", lambda *_: state["reason"])
    best = Fit(KEPT, KEPT.theta(CONSTANTS), 0.0)
    for state["worse"] in (True, False):
        assert held_out_error(best, observations) == pytest.approx(0.0, abs=1e-12)
        assert largest_held_out_error(best, observations) == pytest.approx(0.0, abs=1e-12)
        assert set(seen[-1].backbone) == {4 * 64**2}, "the largest by layers and width, with all of their experts"
    # Folds by the seed: the configurations of the first fold differ.
    first = []
    for seed in (0, 1):
        seen.clear()
        held_out_error(best, observations, seed=seed)
        first.append(set(seen[0].configuration))
    assert first[0] != first[1]
    state["reason"] = "too few"
    assert held_out_error(best, observations) is None and largest_held_out_error(best, observations) is None


def test_the_objective_is_the_huber_loss_over_its_delta_with_the_weights_of_the_runs():
    predicted, jacobian = np.array([0.0005, -0.003, 0.002]), np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    design = SimpleNamespace(log_loss_and_jacobian=lambda theta: (predicted, jacobian))
    value, gradient = _objective(np.zeros(2), design, np.array([0.0, 0.0, 0.002]), np.array([1.0, 2.0, 5.0]))
    # Within delta r^2 / 2 delta, beyond it |r| - delta / 2; the third residual is 0.
    assert value == pytest.approx(0.0005**2 / 2 / 1e-3 + 2 * (0.003 - 0.0005))
    assert gradient == pytest.approx([0.5 - 2 * 2, -2.0])


def test_the_grid_of_starts_contains_a_law_with_exponents_of_the_grid_and_puts_it_first():
    constants = {"E": 1.9, "B": 0.3, "C": 1.2, "alpha": 0.2, "beta": 0.05}
    observations = observations_of(Q_SPARSE, constants, scale=1e3)
    # Runs of different lengths: the weights of their observations differ.
    observations = observations.where((observations.run % 2 == 0) | (observations.tokens == observations.tokens.max()))
    design, weights = Design.of(Q_SPARSE, observations), observations.run_weights
    starts = list(_grid(design, observations, weights))
    assert len(starts) == 5 * 4
    # At most a thousandth of the mean loss: no coefficient starts at 0.
    assert all(np.exp(start[0]) >= 0.999e-3 * observations.loss.mean() for start in starts)
    best = _best_starts(design, observations, weights)
    assert len(best) == 8 and Q_SPARSE.values(best[0]) == pytest.approx(constants, rel=1e-6)
    log_loss = np.log(observations.loss)
    values = [_objective(start, design, log_loss, weights)[0] for start in best]
    assert (
        values == sorted(values)
        and values[-1] <= sorted(_objective(s, design, log_loss, weights)[0] for s in starts)[7]
    )


def test_values_that_differ_in_their_last_bits_count_as_one():
    observations = runs_of(4, sparsity=np.array([0.5, 0.5 + 1e-13, 0.3, 0.3]), total=np.array([1e8, 2e8, 3e8, 4e8]))
    assert why_not(Q_SPARSE, observations) == "S takes 2 values in the runs, and its constants need at least 3"


def test_residuals_are_logarithms_of_measured_over_fitted_losses():
    observations = observations_of(KEPT, CONSTANTS, widths=(64,))
    high = replace(observations, loss=1.1 * observations.loss)
    assert Fit(KEPT, KEPT.theta(CONSTANTS), 0.0).log_residuals(high) == pytest.approx(np.log(1.1))


def test_constants_beyond_their_limits_count_as_the_limit():
    theta = KEPT.theta(CONSTANTS | {"a": 1e300, "alpha": 1e9, "delta": 50.0})
    values = KEPT.values(theta)
    assert values == pytest.approx(CONSTANTS | {"a": np.exp(80.0), "alpha": np.exp(4.0), "delta": 20.0})
    observations = observations_of(KEPT, CONSTANTS, widths=(64,))
    clipped = Design.of(KEPT, observations).loss(KEPT.theta(values))
    np.testing.assert_allclose(Design.of(KEPT, observations).loss(theta), clipped)


def test_the_needed_parameters_of_imagined_models_are_fixed_and_the_others_grow_with_s_and_the_experts():
    models = imagined(needed=6e5, expert_share=0.25, sparsity=np.array([0.0, 0.5, 0.75]), tokens=3e6)
    assert models.needed.tolist() == [6e5] * 3 and models.tokens.tolist() == [3e6] * 3
    assert models.active.tolist() == [6e5, 12e5, 24e5] and models.total.tolist() == [24e5, 48e5, 96e5]
    assert models.expert_share.tolist() == [0.25] * 3


def test_the_s_of_a_law_is_sought_from_0_to_0_95_and_marked_at_either_end():
    assert len(GRID) == 1901 and GRID[-1] == pytest.approx(0.95)
    constants = {"E": 1.0, "a": 0.9, "b": 0.6, "alpha": 0.3, "delta": 2.0, "beta": 1e-4, "nu": 0.5}
    found = find_optimum(KEPT, KEPT.theta(constants), needed=1e6, expert_share=1.0, tolerance=0.1)
    assert (found.sparsity, found.at_edge, found.worse_than_dense_beyond) == (GRID[-1], True, None)
    # L is a exp(beta S/(1-S)) (1-S)^delta / K^alpha here: (1-S)^2 but for beta. K is 1e6, so K^alpha is 1.
    assert found.dense_excess == pytest.approx(1 / (np.exp(1e-4 * 19) * 0.05**2) - 1, rel=1e-6)
    # Within 10 % of the least: 1-S up to 0.05 sqrt(1.1).
    assert found.band == pytest.approx((1 - 0.05 * 1.1**0.5, 0.95), abs=1e-3)


def test_a_form_needs_enough_values_of_each_quantity_and_its_terms_of_size_are_those_of_n_and_s():
    assert {form.name: dict(form.needs) for form in (*JOINT, *PUBLISHED)} == {
        "product": {"N": 3, "E/A": 2, "S": 3, "D": 3},
        "kept": {"K": 3, "N/K": 3, "S": 3, "D": 3},
        "additive": {"N": 3, "E/A": 2, "S": 3, "D": 3},
        "length": {"N": 3, "E/A": 2, "S": 3, "D": 3},
        "q-sparse": {"N": 3, "S": 3},
        "fine-grained-moe": {"N": 3, "G": 3, "D": 3},
        "joint-moe": {"N_active": 3, "E/A": 3, "D": 3},
        "expert-sparsity": {"N": 3, "E/A": 3, "D": 3},
    }
    of_size = {form.name: "".join(sorted(form.by_size)) for form in (*JOINT, *PUBLISHED)}
    assert of_size == {"product": "BC", "kept": "a", "additive": "ah", "q-sparse": "BC"} | {
        "length": "ah",
        "fine-grained-moe": "ag",
        "joint-moe": "a",
        "expert-sparsity": "ad",
    }
    assert {form.name: form.printed_unit for form in PUBLISHED if form.printed_unit != "nats per token"} == {
        "q-sparse": "bits per token"
    }


def test_a_fit_descends_from_every_start_and_goes_on_from_the_three_best_or_from_the_given_constants_alone(monkeypatch):
    calls = []

    def descend(design, observations, weights, theta, effort):
        calls.append((float(theta[0]), effort, weights.tolist()))
        # On the way to the end the order changes.
        return Fit(KEPT, theta, float(theta[0]) if effort is fit_module._SKETCH else -float(theta[0]))

    few = runs_of(3, run=np.array([0, 0, 1]))
    starts = [np.full(7, value) for value in (4.0, 1.0, 5.0, 2.0, 3.0)]
    monkeypatch.setattr(fit_module, "_descend", descend)
    monkeypatch.setattr(fit_module, "_best_starts", lambda *_: starts)
    monkeypatch.setattr(fit_module, "check", lambda *_: None)
    assert fit_module.fit(KEPT, few).theta[0] == 3.0
    assert [(start, effort is fit_module._FULL) for start, effort, _ in calls] == [
        *((start, False) for start in (4.0, 1.0, 5.0, 2.0, 3.0)),
        *((start, True) for start in (1.0, 2.0, 3.0)),
    ]
    assert calls[0][2] == [0.5, 0.5, 1.0], "equal weight per run"
    calls.clear()
    # A resample may lack what determines the constants, near which the fit of all runs already is.
    monkeypatch.setattr(fit_module, "check", None)
    assert fit_module.fit(KEPT, few, near=np.full(7, 9.0), weights=np.array([1.0, 2.0, 3.0])).theta[0] == 9.0
    assert calls == [(9.0, fit_module._RESAMPLE, [1.0, 2.0, 3.0])]


def test_quantities_of_any_scale_can_be_separated_and_one_that_cannot_is_named_with_the_way_out():
    rng = np.random.default_rng(0)
    runs = runs_of(9, total=np.exp(rng.uniform(15, 20, 9)), sparsity=1e-7 * rng.permutation(9.0 * np.arange(1, 10)))
    assert why_not(Q_SPARSE, runs) is None
    together = replace(runs, sparsity=(z := np.log(runs.total / 1e6)) / (1 + z))
    with pytest.raises(ConfigError) as caught:
        fit_module.check(Q_SPARSE, together)
    assert str(caught.value) == (
        "the form q-sparse cannot be fitted: N, S vary together in the runs, so that their effects cannot be "
        "separated; add such runs, or name another --form"
    )
    active = runs_of(3, active=np.array([1e6, 1e6, 2e6]), total=np.array([1e6, 2e6, 3e6]))
    assert why_not(JOINT_MOE, active).startswith(
        "N_active takes 2 values in the runs, and its constants need at least 3"
    )
