"""The study behind ``fit-law``: every form fitted, its uncertainty, the form that predicts best, and the best S."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qsparse_moe.ablation.law.certainty import (
    held_out_error,
    interval,
    largest_held_out_error,
    longest_held_out_error,
    resampled,
)
from qsparse_moe.ablation.law.fit import Fit, check, fit, rms, why_not
from qsparse_moe.ablation.law.forms import Form
from qsparse_moe.ablation.law.joint import JOINT
from qsparse_moe.ablation.law.observations import Observations, seed_spread
from qsparse_moe.ablation.law.optimum import Optimum, find_optimum
from qsparse_moe.ablation.law.published import PUBLISHED, PUBLISHED_OPTIMUM, Q_SPARSE, rounding_corners
from qsparse_moe.ablation.law.read import UNITS, Runs, Unit
from qsparse_moe.errors import ConfigError

FORMS: dict[str, Form] = {form.name: form for form in (*JOINT, *PUBLISHED)}
"""Every form by name."""


@dataclass(frozen=True)
class Choices:
    """The options of a study."""

    forms: tuple[str, ...] = ()
    """Names of ``FORMS``; if empty, the joint forms and the published forms that the runs can determine."""
    bootstrap: int = 200
    """Number of resamples behind an interval."""
    level: float = 0.95
    """Share of the resamples that an interval contains."""
    tolerance: float = 0.01
    """Width of the band around S*, as a share of the least reducible loss."""
    needed: float | None = None
    """Number of needed parameters per token at which S* is determined; None means the geometric mean of the runs."""
    seed: int = 0
    """Seed of the resamples and folds."""


@dataclass(frozen=True)
class BestS:
    """S* at one share of experts, with its bootstrap interval."""

    expert_share: float | None
    """A/E; None if S* is the same at every A/E of the runs."""
    found: Optimum
    interval: tuple[float, float]
    band_interval: tuple[float, float]
    """From the low percentile of the lower ends of the bands to the high percentile of their upper ends."""
    at_edge_share: float
    """Share of the resamples whose S* is 0 or 0.95. If it is large, the runs do not determine S*."""


@dataclass(frozen=True)
class FittedForm:
    """One form with its fit and the uncertainty of the fit."""

    best: Fit
    resamples: tuple[Fit, ...]
    intervals: dict[str, tuple[float, float]]
    fit_error: float
    """RMS of ln(measured/fitted)."""
    held_out_error: float | None
    largest_held_out_error: float | None
    longest_held_out_error: float | None
    optima: tuple[BestS, ...]
    """One S* per A/E, or a single one for all; empty for a form without S."""


@dataclass(frozen=True)
class Study:
    """The fits of all requested forms to a set of runs."""

    runs: Runs
    unit: Unit
    choices: Choices
    needed: float
    fitted: dict[str, FittedForm]
    not_fitted: dict[str, str]
    """The reason why a form that was not requested by name could not be fitted, by its name."""
    seed_spread: float | None

    @property
    def best(self) -> str:
        """Name of the form with the least held-out error, among the joint forms if any was fitted."""
        joint = [name for name in self.fitted if FORMS[name] in JOINT]
        return min(joint or list(self.fitted), key=lambda name: _error(self.fitted[name]))


def study(
    runs: Runs, *, unit: Unit, choices: Choices, notify: Callable[[str, int], None] = lambda what, done: None
) -> Study:
    """Fit every form and determine its uncertainty.

    Args:
        runs: the observations of the runs.
        unit: the unit of their losses.
        choices: the options of the study.
        notify: called with the name of a form and the number of resamples done.

    Raises:
        ConfigError: the runs cannot determine the constants of a joint form or of a form requested by name.
    """
    observations = runs.observations
    requested, not_fitted = _requested(observations, choices)
    # Sizes of a grid grow by factors, and the geometric mean lies in their middle.
    needed = choices.needed or float(np.exp(np.log(observations.needed).mean()))
    fitted = {form.name: _fitted(form, observations, choices, needed, notify) for form in requested}
    return Study(runs, unit, choices, needed, fitted, not_fitted, seed_spread(observations))


def _requested(observations: Observations, choices: Choices) -> tuple[list[Form], dict[str, str]]:
    unknown = [name for name in choices.forms if name not in FORMS]
    if unknown:
        raise ConfigError(f"--form ({unknown[0]}) is not a form; choose from {', '.join(FORMS)}")
    forms = [FORMS[name] for name in dict.fromkeys(choices.forms)] or list(JOINT)
    # Checked for all forms before the first fit, which may take minutes.
    for form in forms:
        try:
            check(form, observations)
        except ConfigError as error:
            possible = [name for name, other in FORMS.items() if why_not(other, observations) is None]
            way_out = f"forms that these runs can determine: {', '.join(possible) or 'none'}"
            raise ConfigError(f"{error} ({way_out})") from None
    # A form requested by name must be fitted or refused; published forms are optional otherwise.
    if choices.forms:
        return forms, {}
    reasons = {form.name: why_not(form, observations) for form in PUBLISHED}
    forms += [form for form in PUBLISHED if reasons[form.name] is None]
    return forms, {name: reason for name, reason in reasons.items() if reason is not None}


def _fitted(
    form: Form, observations: Observations, choices: Choices, needed: float, notify: Callable[[str, int], None]
) -> FittedForm:
    notify(form.name, 0)
    best = fit(form, observations)
    done = iter(range(1, choices.bootstrap + 1))
    number, seed = choices.bootstrap, choices.seed
    again = tuple(resampled(best, observations, number=number, seed=seed, notify=lambda: notify(form.name, next(done))))
    values = {name: np.array([other.constants[name] for other in again]) for name in form.constants}
    return FittedForm(
        best=best,
        resamples=again,
        intervals={name: interval(found, choices.level) for name, found in values.items()},
        fit_error=rms(best.log_residuals(observations), observations),
        held_out_error=held_out_error(best, observations, seed=choices.seed),
        largest_held_out_error=largest_held_out_error(best, observations),
        longest_held_out_error=longest_held_out_error(best, observations),
        optima=_optima(best, again, observations, choices, needed) if form.has_sparsity else (),
    )


def _optima(
    best: Fit, again: Sequence[Fit], observations: Observations, choices: Choices, needed: float
) -> tuple[BestS, ...]:
    """Return one S* per A/E of the runs, or a single one if they agree."""
    # Descending A/E, which is ascending expert sparsity.
    shares = np.unique(observations.expert_share)[::-1]
    # The longest run of the data is the nearest to one that a choice of S is for.
    tokens = float(observations.tokens.max())
    found = [_best_s(best, again, choices, needed, tokens, float(share)) for share in shares]
    if all(abs(other.found.sparsity - found[0].found.sparsity) < 1e-6 for other in found):
        return (BestS(None, *list(vars(found[0]).values())[1:]),)
    return tuple(found)


def _best_s(best: Fit, again: Sequence[Fit], choices: Choices, needed: float, tokens: float, share: float) -> BestS:
    def at(theta: Any) -> Optimum:
        return find_optimum(
            best.form, theta, needed=needed, expert_share=share, tolerance=choices.tolerance, tokens=tokens
        )

    # Each resample has its own optimum, so the interval of S* needs no linearisation.
    others = [at(other.theta) for other in again]
    low, _ = interval(np.array([other.band[0] for other in others]), choices.level)
    _, high = interval(np.array([other.band[1] for other in others]), choices.level)
    return BestS(
        expert_share=share,
        found=at(best.theta),
        interval=interval(np.array([other.sparsity for other in others]), choices.level),
        band_interval=(low, high),
        at_edge_share=float(np.mean([other.at_edge for other in others])),
    )


def printed_optimum(tolerance: float) -> dict[str, Any]:
    """Return S* of the Q-Sparse law with its printed constants, and a warning why it differs from the stated S*."""

    def at(constants: dict[str, float]) -> Optimum:
        theta = Q_SPARSE.theta(constants)
        # S* of this law is the same for every size, because the size is a factor of all terms with S.
        return find_optimum(Q_SPARSE, theta, needed=1e8, expert_share=1.0, tolerance=tolerance)

    corners = [at(constants).sparsity for constants in rounding_corners()]
    found, stated = at(dict(Q_SPARSE.printed)), PUBLISHED_OPTIMUM["full precision"]
    return {
        "sparsity": found.sparsity,
        "band": found.band,
        "stated": stated,
        "rounding": (min(corners), max(corners)),
        "warning": (
            f"the constants that the Q-Sparse paper prints are rounded: they give S* {found.sparsity:.1%}, whereas the "
            f"paper states {stated:.2%}; constants that round to them give {min(corners):.1%} to {max(corners):.1%}"
        ),
    }


def as_dict(done: Study) -> dict[str, Any]:
    """Return the study as values that JSON can hold. The keys are public and do not follow renamings."""
    observations = done.runs.observations
    return {
        "files": list(done.runs.files),
        "unit": UNITS[done.unit],
        "runs": observations.num_runs,
        "left_out": done.runs.left_out,
        "points": len(observations),
        "configurations": len(np.unique(observations.configuration)),
        "ranges": {
            key: [float(values.min()), float(values.max())]
            for key, values in {
                "total": observations.total,
                "active": observations.active,
                "kept": observations.needed,
                "sparsity": observations.sparsity,
                "tokens": observations.tokens,
                "loss": observations.loss,
                "expert_share": observations.expert_share,
            }.items()
        },
        "bootstrap": done.choices.bootstrap,
        "level": done.choices.level,
        "tolerance": done.choices.tolerance,
        "seed": done.choices.seed,
        "kept_parameters": done.needed,
        "seed_spread": done.seed_spread,
        "best": done.best,
        "forms": {name: _form_dict(found) for name, found in done.fitted.items()},
        "not_fitted": done.not_fitted,
        "printed": printed_optimum(done.choices.tolerance),
    }


def _form_dict(found: FittedForm) -> dict[str, Any]:
    form = found.best.form
    return {
        "formula": form.formula,
        "source": form.source,
        "constants": {
            name: {"value": value, "interval": list(found.intervals[name]), "printed": form.printed.get(name)}
            for name, value in found.best.constants.items()
        },
        "printed_unit": form.printed_unit or None,
        "fit_error": found.fit_error,
        "held_out_error": found.held_out_error,
        "largest_held_out_error": found.largest_held_out_error,
        "longest_held_out_error": found.longest_held_out_error,
        "optima": [
            {
                "expert_share": best.expert_share,
                "interval": list(best.interval),
                "band_interval": list(best.band_interval),
                "at_edge_share": best.at_edge_share,
                **vars(best.found),
            }
            for best in found.optima
        ],
    }


def _error(found: FittedForm) -> float:
    return found.fit_error if found.held_out_error is None else found.held_out_error
