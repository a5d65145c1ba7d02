"""How far a fit can be trusted: intervals by resampling runs, and errors on runs that the fit did not see.

R resamples, P constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from qsparse_moe.ablation.law.fit import Fit, fit, rms, why_not
from qsparse_moe.ablation.law.observations import Array, Observations

FOLDS = 5


def resampled(
    best: Fit, observations: Observations, *, number: int, seed: int = 0, notify: Callable[[], None] = lambda: None
) -> list[Fit]:
    """``number`` fits to runs drawn with replacement, as many as there are; all observations of a run come with it.

    Each starts from ``best``, in whose valley it stays. ``notify`` is called after each.
    """
    generator = np.random.default_rng(seed)
    runs, place = np.unique(observations.run, return_inverse=True)
    share = np.full(len(runs), 1 / len(runs))
    found = []
    for drawn in generator.multinomial(len(runs), share, size=number):
        found.append(fit(best.form, observations, weights=observations.run_weights * drawn[place], near=best.theta))
        notify()
    return found


def interval(values: Array, level: float) -> tuple[float, float]:
    """The percentiles between which a share ``level`` of the values lies."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def held_out_error(best: Fit, observations: Observations, *, seed: int = 0) -> float | None:
    """RMS of ln(measured/predicted) over configurations that the fit did not see, in ``FOLDS`` parts.

    All seeds of a configuration are in one part: a run would be no surprise to a fit that knew its twin. None where
    the rest of some part cannot tell the constants.
    """
    residuals = np.empty(len(observations))
    for held in _folds(observations, seed):
        seen = observations.where(~held)
        if why_not(best.form, seen) is not None:
            return None
        residuals[held] = _refit(best, seen).log_residuals(observations.where(held))
    return rms(residuals, observations)


def largest_held_out_error(best: Fit, observations: Observations) -> float | None:
    """The same for the models of the largest layers x width², predicted from the smaller ones; None where it cannot."""
    held = observations.backbone == observations.backbone.max()
    if held.all() or why_not(best.form, observations.where(~held)) is not None:
        return None
    unseen = observations.where(held)
    return rms(_refit(best, observations.where(~held)).log_residuals(unseen), unseen)


def _refit(best: Fit, seen: Observations) -> Fit:
    """The better of a fit from the grid and one from the constants of all observations."""
    candidates = (fit(best.form, seen), fit(best.form, seen, near=best.theta))
    return min(candidates, key=lambda found: found.objective)


def _folds(observations: Observations, seed: int) -> Iterator[NDArray[np.bool_]]:
    configurations = np.random.default_rng(seed).permutation(np.unique(observations.configuration))
    for part in np.array_split(configurations, min(FOLDS, len(configurations))):
        yield np.isin(observations.configuration, part)
