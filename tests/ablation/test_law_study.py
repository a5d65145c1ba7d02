"""The steps of a study of laws, each with the others replaced: what is fitted, compared, chosen, and reported."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qsparse_moe.ablation.law import study as study_module
from qsparse_moe.ablation.law.fit import Fit
from qsparse_moe.ablation.law.joint import ADDITIVE, KEPT, PRODUCT
from qsparse_moe.ablation.law.observations import imagined
from qsparse_moe.ablation.law.optimum import Optimum
from qsparse_moe.ablation.law.published import FINE_GRAINED, Q_SPARSE, rounding_corners
from qsparse_moe.ablation.law.read import Runs
from qsparse_moe.ablation.law.study import BestS, Choices, FittedForm, Study, as_dict, printed_optimum
from tests.ablation.law_runs import observations_of

CONSTANTS = {"E": 1.0, "a": 0.9, "b": 0.6, "alpha": 0.3, "delta": 0.2, "beta": 0.1, "nu": 0.5}
FOUND = Optimum(0.5, False, (0.4, 0.6), 0.03, None)


def runs_of(number, **fields):
    models = imagined(needed=1e6, expert_share=0.5, sparsity=np.zeros(number))
    index = np.arange(number)
    return replace(models, **({"run": index, "configuration": index, "loss": np.ones(number)} | fields))


def fitted(form=KEPT, *, fit_error=0.1, held_out_error=0.2, optima=()):
    best = Fit(form, form.theta(dict.fromkeys(form.constants, 0.5)), 0.0)
    intervals = dict.fromkeys(form.constants, (0.4, 0.7))
    return FittedForm(best, (), intervals, fit_error, held_out_error, 0.3, 0.4, optima)


def study_of(observations, forms, **fields):
    runs = Runs(observations, ("one.jsonl", "two.jsonl"), 3)
    choices = Choices(bootstrap=7, level=0.8, tolerance=0.02, seed=5)
    given = {"needed": 9e5, "not_fitted": {"joint-moe": "why"}, "seed_spread": 0.004} | fields
    return Study(runs=runs, unit="bits", choices=choices, fitted=forms, **given)


def test_the_best_form_is_the_joint_one_with_the_least_held_out_error():
    forms = {
        "q-sparse": fitted(Q_SPARSE, held_out_error=0.01),
        "kept": fitted(held_out_error=0.3, fit_error=0.05),
        "product": fitted(PRODUCT, held_out_error=0.2, fit_error=0.19),
    }
    assert study_of(runs_of(1), forms).best == "product"
    # Where nothing could be held out, the error of the fit decides.
    forms["additive"] = fitted(ADDITIVE, held_out_error=None, fit_error=0.15)
    assert study_of(runs_of(1), forms).best == "additive"
    del forms["additive"], forms["product"], forms["kept"]
    forms["fine-grained-moe"] = fitted(FINE_GRAINED, held_out_error=0.009)
    assert study_of(runs_of(1), forms).best == "fine-grained-moe"


def test_published_forms_are_fitted_if_the_runs_determine_them_unless_forms_are_requested(monkeypatch):
    reasons = {"fine-grained-moe": "no G", "expert-sparsity": "no E/A"}
    monkeypatch.setattr(study_module, "why_not", lambda form, _: reasons.get(form.name))
    monkeypatch.setattr(study_module, "check", lambda form, _: None)
    found, not_fitted = study_module._requested(runs_of(1), Choices())
    assert [form.name for form in found] == [
        "product",
        "kept",
        "additive",
        "length",
        "q-sparse",
        "joint-moe",
    ]
    assert not_fitted == reasons
    twice = Choices(forms=("kept", "q-sparse", "kept"))
    assert study_module._requested(runs_of(1), twice) == ([KEPT, Q_SPARSE], {})


def test_one_best_s_stands_for_all_shares_of_experts_only_if_they_agree(monkeypatch):
    def best_s(best, again, choices, needed, tokens, share):
        assert tokens == 1e9
        return BestS(share, replace(FOUND, sparsity=0.5 + by_share * share), (share, 1.0), (0.2, 0.9), 0.25)

    monkeypatch.setattr(study_module, "_best_s", best_s)
    observations = runs_of(3, experts=np.array([2.0, 8.0, 4.0]), experts_per_token=np.ones(3))
    by_share = 1e-4
    found = study_module._optima(None, (), observations, Choices(), 1e6)
    assert [one.expert_share for one in found] == [0.5, 0.25, 0.125], "from few to many experts"
    by_share = 1e-8
    (one,) = study_module._optima(None, (), observations, Choices(), 1e6)
    # The rest is that of the largest share.
    assert (one.expert_share, one.interval, one.band_interval, one.at_edge_share) == (
        None,
        (0.5, 1.0),
        (0.2, 0.9),
        0.25,
    )
    assert one.found.sparsity == 0.5 + 1e-8 * 0.5


def test_a_form_is_fitted_resampled_and_held_out_with_the_options_of_the_study(monkeypatch):
    asked, told = {}, []
    theta = KEPT.theta(CONSTANTS)

    def again(best, observations, *, number, seed, notify):
        asked.update(number=number, seed=seed)
        for _ in range(number):
            notify()
        return [Fit(KEPT, KEPT.theta(CONSTANTS | {"alpha": alpha}), 0.0) for alpha in (0.1, 0.2, 0.4, 0.9)]

    def held_out(best, observations, *, seed):
        asked["folds"] = seed
        return 0.02

    observations = observations_of(KEPT, CONSTANTS, widths=(64,))
    # 1 % too high in one run of twelve, whose five observations count as one.
    high = replace(observations, loss=np.where(observations.run == 0, np.exp(0.01), 1.0) * observations.loss)
    monkeypatch.setattr(study_module, "fit", lambda form, _: Fit(form, theta, 123.0))
    monkeypatch.setattr(study_module, "resampled", again)
    monkeypatch.setattr(study_module, "held_out_error", held_out)
    monkeypatch.setattr(study_module, "largest_held_out_error", lambda *_: 0.03)
    monkeypatch.setattr(study_module, "longest_held_out_error", lambda *_: 0.04)
    monkeypatch.setattr(study_module, "_optima", lambda *_: ("optima",))
    choices = Choices(bootstrap=3, level=0.5, seed=11)
    found = study_module._fitted(KEPT, high, choices, 1e6, lambda name, done: told.append((name, done)))
    assert asked == {"number": 3, "seed": 11, "folds": 11}
    assert told == [("kept", 0), ("kept", 1), ("kept", 2), ("kept", 3)]
    # Quartiles of 0.1, 0.2, 0.4, and 0.9 by linear interpolation.
    assert found.intervals["alpha"] == pytest.approx((0.175, 0.525)) and found.intervals["E"] == pytest.approx((1, 1))
    assert found.fit_error == pytest.approx(0.01 / 12**0.5)
    assert (found.held_out_error, found.largest_held_out_error, found.optima) == (0.02, 0.03, ("optima",))
    assert found.longest_held_out_error == 0.04
    monkeypatch.setattr(study_module, "resampled", lambda *_, **__: [Fit(FINE_GRAINED, np.zeros(7), 0.0)])
    assert study_module._fitted(FINE_GRAINED, high, choices, 1e6, lambda *_: None).optima == (), "it has no S"


def test_every_optimum_of_a_study_has_the_tolerance_the_size_and_the_share_that_were_asked_for(monkeypatch):
    asked = []

    def found(form, theta, **settings):
        asked.append(settings)
        return FOUND

    monkeypatch.setattr(study_module, "find_optimum", found)
    fits = [SimpleNamespace(form=None, theta=0.0)] * 3
    study_module._best_s(fits[0], fits, Choices(tolerance=0.03), 7e5, 3e6, 0.25)
    assert asked == [{"needed": 7e5, "expert_share": 0.25, "tolerance": 0.03, "tokens": 3e6}] * 4


def test_a_report_has_the_ranges_counts_and_options_of_the_study_and_everything_about_its_forms():
    observations = runs_of(
        3,
        total=np.array([2.0, 3.0, 1.0]),
        active=np.array([20.0, 30.0, 10.0]),
        needed=np.array([12.0, 13.0, 11.0]),
        sparsity=np.array([0.2, 0.9, 0.5]),
        tokens=np.array([5.0, 9.0, 7.0]),
        loss=np.array([3.0, 4.0, 2.0]),
        experts=np.array([4.0, 8.0, 2.0]),
        run=np.array([0, 0, 1]),
        configuration=np.array([4, 4, 4]),
    )
    best_s = BestS(0.25, FOUND, (0.3, 0.7), (0.1, 0.8), 0.0)
    report = as_dict(study_of(observations, {"q-sparse": fitted(Q_SPARSE, optima=(best_s,)), "kept": fitted()}))
    printed = report.pop("printed")
    assert (
        printed["band"] == pytest.approx(printed_optimum(0.02)["band"]) != pytest.approx(printed_optimum(0.01)["band"])
    )
    forms = report.pop("forms")
    assert report == {
        "files": ["one.jsonl", "two.jsonl"],
        "unit": "bits per token",
        "runs": 2,
        "left_out": 3,
        "points": 3,
        "configurations": 1,
        "ranges": {
            "total": [1.0, 3.0],
            "active": [10.0, 30.0],
            "kept": [11.0, 13.0],
            "sparsity": [0.2, 0.9],
            "tokens": [5.0, 9.0],
            "loss": [2.0, 4.0],
            "expert_share": [0.125, 0.5],
        },
        "bootstrap": 7,
        "level": 0.8,
        "tolerance": 0.02,
        "seed": 5,
        "kept_parameters": 9e5,
        "seed_spread": 0.004,
        "best": "kept",
        "not_fitted": {"joint-moe": "why"},
    }
    assert list(forms) == ["q-sparse", "kept"]
    assert forms["q-sparse"]["constants"]["C"] == {"value": pytest.approx(0.5), "interval": [0.4, 0.7], "printed": 1.89}
    assert forms["kept"]["constants"]["a"]["printed"] is None and forms["kept"]["printed_unit"] is None
    assert forms["q-sparse"]["printed_unit"] == "bits per token"
    errors = [
        forms["kept"][name]
        for name in ("fit_error", "held_out_error", "largest_held_out_error", "longest_held_out_error")
    ]
    assert errors == [0.1, 0.2, 0.3, 0.4]
    assert forms["q-sparse"]["optima"] == [
        {"expert_share": 0.25, "interval": [0.3, 0.7], "band_interval": [0.1, 0.8], "at_edge_share": 0.0} | vars(FOUND)
    ]


def test_printed_constants_are_rounded_to_two_decimals_and_their_optimum_to_a_range_around_it():
    corners = rounding_corners()
    assert len(corners) == 16 and {corner["E"] for corner in corners} == {1.86}
    ends = {name: sorted({round(corner[name], 6) for corner in corners}) for name in ("B", "C", "alpha", "beta")}
    assert ends == {"B": [0.005, 0.015], "C": [1.885, 1.895], "alpha": [0.095, 0.105], "beta": [0.045, 0.055]}
    found = printed_optimum(0.02)
    low, high = found["rounding"]
    assert low < found["sparsity"] < high
    assert found["warning"].endswith(f"constants that round to them give {low:.1%} to {high:.1%}")
