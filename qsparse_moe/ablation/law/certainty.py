"""Uncertainty of a fit: bootstrap intervals over runs, and errors on held-out runs.

R resamples, P constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from qsparse_moe.ablation.law.fit import Fit, fit, rms, why_not
from qsparse_moe.ablation.law.observations import Array, Observations

FOLDS = 5
"""Number of folds of the cross-validation."""


def resampled(
    best: Fit, observations: Observations, *, number: int, seed: int = 0, notify: Callable[[], None] = lambda: None
) -> list[Fit]:
    """Return ``number`` fits to runs drawn with replacement; a run is drawn with all its observations.

    Each fit starts from ``best`` and finds the local minimum there. ``notify`` is called after each fit.
    """
    generator = np.random.default_rng(seed)
    runs, run_index = np.unique(observations.run, return_inverse=True)
    share = np.full(len(runs), 1 / len(runs))
    found = []
    # A run that is drawn k times gets k times its weight, which is the same as repeating its observations.
    for drawn in generator.multinomial(len(runs), share, size=number):
        # A fit from the grid of starts per resample would take many times as long, and 200 resamples are the default.
        found.append(fit(best.form, observations, weights=observations.run_weights * drawn[run_index], near=best.theta))
        notify()
    return found


def interval(values: Array, level: float) -> tuple[float, float]:
    """Return the central interval that contains a share ``level`` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def held_out_error(best: Fit, observations: Observations, *, seed: int = 0) -> float | None:
    """Return the RMS of ln(measured/predicted) over held-out configurations, by cross-validation.

    All seeds of a configuration are in the same fold, because a fit that has seen one seed predicts the others too
    well. None if the constants cannot be determined without some fold.
    """
    # Each observation is predicted exactly once, so the folds need no weights of their own.
    residuals = np.empty(len(observations))
    for held in _folds(observations, seed):
        seen = observations.where(~held)
        if why_not(best.form, seen) is not None:
            return None
        residuals[held] = _refit(best, seen).log_residuals(observations.where(held))
    return rms(residuals, observations)


def largest_held_out_error(best: Fit, observations: Observations) -> float | None:
    """Return the same error for the models with the largest layers x width², predicted from the smaller ones.

    None if there is only one size, or if the smaller models cannot determine the constants.
    """
    held = observations.backbone == observations.backbone.max()
    if held.all() or why_not(best.form, observations.where(~held)) is not None:
        return None
    unseen = observations.where(held)
    return rms(_refit(best, observations.where(~held)).log_residuals(unseen), unseen)


def longest_held_out_error(best: Fit, observations: Observations) -> float | None:
    """Return the same error for the sparse models at the end of the longest runs, predicted from everything else.

    The dense models remain at every length, so that this measures the prediction of what S costs in a longer run. None
    if there is only one length or no dense model, or if the rest cannot determine the constants.
    """
    held = (observations.tokens == observations.tokens.max()) & (observations.sparsity > 0)
    if not held.any() or held.all() or why_not(best.form, observations.where(~held)) is not None:
        return None
    unseen = observations.where(held)
    return rms(_refit(best, observations.where(~held)).log_residuals(unseen), unseen)


def _refit(best: Fit, seen: Observations) -> Fit:
    """Return the better of two fits: one from the grid of starts and one from the constants of all observations.

    The second guards against a poor local minimum, which would count as a prediction error of the form.
    """
    candidates = (fit(best.form, seen), fit(best.form, seen, near=best.theta))
    return min(candidates, key=lambda found: found.objective)


def _folds(observations: Observations, seed: int) -> Iterator[NDArray[np.bool_]]:
    configurations = np.random.default_rng(seed).permutation(np.unique(observations.configuration))
    # Fewer configurations than folds give leave-one-out.
    for part in np.array_split(configurations, min(FOLDS, len(configurations))):
        yield np.isin(observations.configuration, part)
