"""Fit the constants of a form: Huber loss on the log of the loss, minimised by L-BFGS from a grid of starts.

P constants, C coefficients, n observations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize, nnls

from qsparse_moe.ablation.law.forms import QUANTITIES, Design, Form
from qsparse_moe.ablation.law.observations import Array, Observations
from qsparse_moe.errors import ConfigError

HUBER_DELTA = 1e-3
"""Delta of the Huber loss, as in the Q-Sparse paper: residuals above 0.1 % of the loss count linearly."""
_DESCENTS = 8  # number of grid starts, best first, with a short L-BFGS descent
_TO_THE_END = 3  # number of those descents that continue to convergence
_COLLINEAR = 1e-6  # ratio of the smallest to the largest singular value below which quantities are collinear


class _Effort(NamedTuple):
    """The stopping rule of L-BFGS. Each round uses the metric at the point that the round before reached."""

    rounds: int
    iterations: int
    """Iterations per round."""
    gain: float
    """The last round is the one that lowers the objective by at most this share."""


_SKETCH = _Effort(rounds=1, iterations=80, gain=1.0)
_FULL = _Effort(rounds=8, iterations=150, gain=1e-6)
# Compared with _FULL on 100 resamples of 48 runs with 0.5 % noise, the median constant differs by at most 9 % of its
# interval (B of q-sparse), 5 % in expert-sparsity, and less than 0.01 % in the joint forms, in down to a third of the
# time.
_RESAMPLE = _Effort(rounds=3, iterations=80, gain=1e-4)


@dataclass(frozen=True)
class Fit:
    """A form with fitted constants."""

    form: Form
    theta: Array
    objective: float
    """Huber loss divided by ``HUBER_DELTA``, which is close to the sum over runs of the mean absolute log residual."""

    @property
    def constants(self) -> dict[str, float]:
        """Return the constants by name."""
        return self.form.values(self.theta)

    def loss(self, observations: Observations) -> Array:
        """Return the predicted losses, ``(n,)``."""
        return Design.of(self.form, observations).loss(self.theta)

    def log_residuals(self, observations: Observations) -> Array:
        """Return ln(measured/fitted), ``(n,)``, which is close to the relative error."""
        return np.log(observations.loss) - np.log(self.loss(observations))


def rms(log_residuals: Array, observations: Observations) -> float:
    """Return the root mean square with equal weight per run."""
    weights = observations.run_weights
    return float(np.sqrt((weights * log_residuals**2).sum() / weights.sum()))


def why_not(form: Form, observations: Observations) -> str | None:
    """Return the reason why the observations cannot determine the constants of ``form``; None if they can."""
    for name, needed in form.needs.items():
        # Rounded, so that values that differ only in the last bits count as one.
        different = np.unique(np.round(QUANTITIES[name](observations), 9))
        if len(different) < needed:
            return (
                f"{name} takes {_number(len(different), 'value')} in the runs, and its constants need at least {needed}"
            )
    # Runs and not observations: the evaluations of one run are not independent.
    if observations.num_runs <= len(form.constants):
        return (
            f"it has {len(form.constants)} constants and there are {_number(observations.num_runs, 'run')}; at least "
            f"{len(form.constants) + 1} are needed"
        )
    columns = np.stack([QUANTITIES[name](observations) for name in form.needs])
    # Constant offsets are absorbed by the coefficients, so only variation around the mean can determine an exponent.
    columns = columns - columns.mean(1, keepdims=True)
    singular = np.linalg.svd(columns / np.linalg.norm(columns, axis=1, keepdims=True), compute_uv=False)
    if singular[-1] < _COLLINEAR * singular[0]:
        return f"{', '.join(form.needs)} vary together in the runs, so that their effects cannot be separated"
    return None


def check(form: Form, observations: Observations) -> None:
    """Raise ConfigError unless the observations can determine the constants of ``form``."""
    # Checked before the fit: an undetermined fit would converge to arbitrary constants without any sign of it.
    reason = why_not(form, observations)
    if reason is not None:
        raise ConfigError(f"the form {form.name} cannot be fitted: {reason}; add such runs, or name another --form")


def fit(form: Form, observations: Observations, *, weights: Array | None = None, near: Array | None = None) -> Fit:
    """Return the constants at which the Huber loss is least.

    Args:
        form: the form of the law.
        observations: the measured losses.
        weights: weights of the observations, ``(n,)``; None means equal weight per run.
        near: constants of a fit to nearly the same observations, ``(P,)``. L-BFGS then starts only there.

    Raises:
        ConfigError: the observations cannot determine the constants.
    """
    if near is None:
        check(form, observations)
    design = Design.of(form, observations)
    weights = observations.run_weights if weights is None else weights
    if near is not None:
        return _descend(design, observations, weights, near, _RESAMPLE)
    sketches = [
        _descend(design, observations, weights, start, _SKETCH) for start in _best_starts(design, observations, weights)
    ]
    better = sorted(sketches, key=_by_objective)[:_TO_THE_END]
    return min((_descend(design, observations, weights, found.theta, _FULL) for found in better), key=_by_objective)


def _by_objective(found: Fit) -> float:
    return found.objective


def _objective(theta: Array, design: Design, log_loss: Array, weights: Array) -> tuple[float, Array]:
    predicted, jacobian_Pn = design.log_loss_and_jacobian(theta)
    residual = predicted - log_loss
    # Huber loss and its gradient from the clipped residual, without branches.
    cut = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
    value = float((weights * cut * (residual - cut / 2)).sum() / HUBER_DELTA)
    return value, jacobian_Pn @ (weights * cut) / HUBER_DELTA


def _descend(design: Design, observations: Observations, weights: Array, theta: Array, effort: _Effort) -> Fit:
    """Run L-BFGS in rounds, each preconditioned at its starting point.

    The constants of a power law trade against each other, so that the objective has long narrow valleys, in which plain
    L-BFGS stops far from the minimum.
    """
    log_loss = np.log(observations.loss)
    value, _ = _objective(theta, design, log_loss, weights)
    for _ in range(effort.rounds):
        step = _metric(theta, design, weights)
        # Bound as default arguments below, so that the closure does not capture variables of the loop.
        base = theta

        def moved(z: Array, base: Array = base, step: Array = step) -> tuple[float, Array]:
            found, gradient = _objective(base + step @ z, design, log_loss, weights)
            return found, step.T @ gradient

        # Tolerances near the precision of float64: the rounds, not L-BFGS, decide when to stop.
        options = {"maxiter": effort.iterations, "maxcor": 20, "ftol": 1e-13, "gtol": 1e-11}
        result = minimize(moved, np.zeros(len(theta)), jac=True, method="L-BFGS-B", options=options)
        gained = value - float(result.fun)
        if gained <= 0:
            break
        theta, value = base + step @ result.x, float(result.fun)
        if gained <= effort.gain * value:
            break
    # The design evaluated the clipped constants, so these are the ones with this objective.
    return Fit(design.form, np.clip(theta, *design.bounds), value)


def _metric(theta: Array, design: Design, weights: Array) -> Array:
    """Return ``(P, P)`` directions, in its columns, that each change the log losses by about ``HUBER_DELTA``."""
    _, jacobian_Pn = design.log_loss_and_jacobian(theta)
    eigenvalues, vectors = np.linalg.eigh((jacobian_Pn * weights) @ jacobian_Pn.T / HUBER_DELTA)
    # The floor bounds steps along directions that the observations do not determine.
    return vectors / np.sqrt(np.maximum(eigenvalues, 1e-9 * eigenvalues[-1]))


def _best_starts(design: Design, observations: Observations, weights: Array) -> list[Array]:
    """Return the ``_DESCENTS`` starts of the grid with the least Huber loss."""
    log_loss = np.log(observations.loss)
    starts = list(_grid(design, observations, weights))
    return sorted(starts, key=lambda theta: _objective(theta, design, log_loss, weights)[0])[:_DESCENTS]


def _grid(design: Design, observations: Observations, weights: Array) -> Iterator[Array]:
    """Yield every combination of starting exponents with its coefficients from non-negative least squares."""
    form = design.form
    root = np.sqrt(weights)
    # At fixed exponents the loss is linear in the coefficients, which need no grid of their own.
    for exponents in itertools.product(*form.starts.values()):
        basis_Cn = design.basis(np.array(exponents))
        # Scaled columns: the powers of N and D differ by many orders of magnitude.
        largest_C = np.abs(basis_Cn).max(1)
        columns_nC = (basis_Cn / largest_C[:, None] / observations.loss * root).T
        found, _ = nnls(columns_nC, root)
        # Constants move as logarithms, so a coefficient must not start at 0.
        coefficients = np.maximum(found, 1e-3 * observations.loss.mean()) / largest_C
        named = zip(form.constants, [*coefficients, *exponents], strict=True)
        yield form.theta({name: float(value) for name, value in named})


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
