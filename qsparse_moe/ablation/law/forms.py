"""Forms of a law: sums of terms, each a positive coefficient times powers.

Every form is ``L = Σ_m ± c_m · exp(Σ_k p_k · v_mk)``: coefficients ``c``, and exponents ``p`` over variables
``v`` of the run, such as ``−ln N`` for ``N^−α`` and ``1/(1−S)`` for ``exp(β/(1−S))``. All forms therefore share one
evaluation, one exact gradient, and one search for starting points.

M terms, C coefficients, K exponents, P = C + K constants, n observations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qsparse_moe.ablation.law.observations import Array, Observations

Variable = Callable[[Observations], Array]

# Beyond these limits a term has no effect, and the powers of such constants overflow.
_LOG_COEFFICIENT = (-80.0, 80.0)
_LOG_EXPONENT = (-12.0, 4.0)
_SIGNED_EXPONENT = (-20.0, 20.0)


@dataclass(frozen=True)
class Term:
    """``sign · coefficient · exp(Σ exponent · variable)``."""

    coefficient: str
    powers: Mapping[str, Variable] = field(default_factory=dict)
    """The variable that each exponent multiplies, by the name of the exponent."""
    sign: int = 1


@dataclass(frozen=True)
class Form:
    """A law whose constants have no values yet."""

    name: str
    formula: str
    source: str
    terms: tuple[Term, ...]
    starts: Mapping[str, tuple[float, ...]]
    """Starting values of each exponent, which the grid combines; the coefficients follow from them."""
    needs: Mapping[str, int]
    """Number of different values that the fit needs per quantity, a key of ``QUANTITIES``."""
    signed: frozenset[str] = frozenset()
    """Exponents that may be negative. All other constants are positive."""
    by_size: frozenset[str] = frozenset()
    """Coefficients of the terms that depend on N and S, which a choice of S can reduce."""
    printed: Mapping[str, float] = field(default_factory=dict)
    """The constants as printed in the source."""
    printed_unit: str = ""
    """Unit of the loss for the printed constants."""

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the coefficients, in the order of the terms."""
        return tuple(dict.fromkeys(term.coefficient for term in self.terms))

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents, in the order of ``starts``."""
        return tuple(self.starts)

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the coefficients and then of the exponents: the order of ``theta``."""
        return self.coefficients + self.exponents

    @property
    def has_sparsity(self) -> bool:
        """True if the form depends on S."""
        return "S" in self.needs

    def theta(self, constants: Mapping[str, float]) -> Array:
        """Return the constants as the fit moves them, ``(P,)``: logarithms, except for signed exponents."""
        # Logarithms keep positive constants positive and give power laws comparable step sizes.
        return np.array([constants[c] if c in self.signed else np.log(constants[c]) for c in self.constants])

    def values(self, theta: Array) -> dict[str, float]:
        """Return the constants of ``theta`` by name."""
        theta = np.clip(theta, *self.bounds)
        both = zip(self.constants, theta, strict=True)
        return {name: float(value if name in self.signed else np.exp(value)) for name, value in both}

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper limits of ``theta``, ``(P,)`` each, within which no term overflows."""
        bounds = [_LOG_COEFFICIENT] * len(self.coefficients)
        bounds += [_SIGNED_EXPONENT if name in self.signed else _LOG_EXPONENT for name in self.exponents]
        low, high = zip(*bounds, strict=True)
        return np.array(low), np.array(high)

    def loss(self, constants: Mapping[str, float], observations: Observations) -> Array:
        """Return the losses under these constants, ``(n,)``."""
        return Design.of(self, observations).loss(self.theta(constants))


@dataclass(frozen=True)
class Design:
    """A form with the variables of given observations: everything that is constant during a fit."""

    form: Form
    variables_KMn: Array
    """The variables; zero if a term does not have the exponent."""
    sign_CM: Array
    """The sign of each term in the row of its coefficient, 0 elsewhere."""
    signed_K: NDArray[np.bool_]
    bounds: tuple[Array, Array]

    @classmethod
    def of(cls, form: Form, observations: Observations) -> Design:
        """Compute the variables of every term once."""
        variables = np.zeros((len(form.exponents), len(form.terms), len(observations)))
        signs = np.zeros((len(form.coefficients), len(form.terms)))
        for m, term in enumerate(form.terms):
            signs[form.coefficients.index(term.coefficient), m] = term.sign
            for name, variable in term.powers.items():
                variables[form.exponents.index(name), m] = variable(observations)
        return cls(form, variables, signs, np.array([name in form.signed for name in form.exponents]), form.bounds)

    def basis(self, exponents_K: Array) -> Array:
        """Return the factor of each coefficient at given exponents, ``(C, n)``."""
        return self.sign_CM @ self._powers(exponents_K)

    def loss(self, theta: Array) -> Array:
        """Return the losses, ``(n,)``."""
        coefficients_C, exponents_K, _ = self._constants(theta)
        return coefficients_C @ self.basis(exponents_K)

    def reducible(self, theta: Array) -> Array:
        """Return the sum of the terms that depend on N and S, ``(n,)``."""
        coefficients_C, exponents_K, _ = self._constants(theta)
        by_size = np.array([name in self.form.by_size for name in self.form.coefficients])
        return (coefficients_C * by_size) @ self.basis(exponents_K)

    def log_loss_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Return ln L, ``(n,)``, and its derivative with respect to ``theta``, ``(P, n)``."""
        coefficients_C, exponents_K, slopes_K = self._constants(theta)
        powers_Mn = self._powers(exponents_K)
        by_coefficient_Cn = coefficients_C[:, None] * (self.sign_CM @ powers_Mn)
        # A term has exactly one coefficient, so this product selects it together with its sign.
        terms_Mn = (coefficients_C @ self.sign_CM)[:, None] * powers_Mn
        by_exponent_Kn = slopes_K[:, None] * np.einsum("kmn,mn->kn", self.variables_KMn, terms_Mn)
        loss_n = terms_Mn.sum(0)
        return np.log(loss_n), np.concatenate([by_coefficient_Cn, by_exponent_Kn]) / loss_n

    def _powers(self, exponents_K: Array) -> Array:
        """Return every term without its coefficient, ``(M, n)``."""
        _, num_terms, num_points = self.variables_KMn.shape
        # One matrix product over all terms and observations; the fit evaluates this thousands of times.
        return np.exp(exponents_K @ self.variables_KMn.reshape(-1, num_terms * num_points)).reshape(num_terms, -1)

    def _constants(self, theta: Array) -> tuple[Array, Array, Array]:
        """Return coefficients, exponents, and the derivative of each exponent by its entry of ``theta``."""
        theta = np.clip(theta, *self.bounds)
        split = len(self.sign_CM)
        # The inner where keeps exp from overflowing for signed exponents, whose branch is not selected.
        signed, exponents = self.signed_K, theta[split:]
        exponents_K = np.where(signed, exponents, np.exp(np.where(signed, 0.0, exponents)))
        return np.exp(theta[:split]), exponents_K, np.where(signed, 1.0, exponents_K)


def total(unit: float = 1.0) -> Variable:
    """Return ``−ln N`` of all parameters, in ``unit``: the variable of ``N^−α``."""
    return lambda observations: -np.log(observations.total / unit)


def tokens(unit: float = 1.0) -> Variable:
    """Return ``−ln D``, in ``unit``: the variable of ``D^−β``."""
    return lambda observations: -np.log(observations.tokens / unit)


def token_growth(unit: float = 1.0) -> Variable:
    """Return ``ln D``, in ``unit``: the variable of ``D^κ``, which grows with the length of the run."""
    return lambda observations: np.log(observations.tokens / unit)


def root_of_tokens(unit: float = 1.0) -> Variable:
    """Return ``−√D``, in ``unit``: the variable of ``exp(−λ√D)``."""
    return lambda observations: -np.sqrt(observations.tokens / unit)


def size_and_tokens(unit: float = 1.0) -> Variable:
    """Return ``−ln N ln D``, both in ``unit``: the variable of ``D^(−ζ ln N)``."""
    return lambda observations: -np.log(observations.total / unit) * np.log(observations.tokens / unit)


def needed(unit: float = 1.0) -> Variable:
    """Return ``−ln K`` of the needed parameters, in ``unit``."""
    return lambda observations: -np.log(observations.needed / unit)


def expert_share(observations: Observations) -> Array:
    """Return ``−ln(1−s) = −ln(A/E)``: the variable of ``(1−s)^−δ``."""
    return -np.log(observations.expert_share)


def stored_per_needed(observations: Observations) -> Array:
    """Return ``−ln(N/K)``, of the stored parameters per needed parameter."""
    return -np.log(observations.total / observations.needed)


def granularity(observations: Observations) -> Array:
    """Return ``−ln G``."""
    return -np.log(observations.granularity)


def density(observations: Observations) -> Array:
    """Return ``1/(1−S)``: the variable of ``exp(β/(1−S))``."""
    return 1.0 / (1.0 - observations.sparsity)


def zeros_per_nonzero(observations: Observations) -> Array:
    """Return ``S/(1−S)``: the same variable minus 1, which is 0 for a dense model."""
    return observations.sparsity / (1.0 - observations.sparsity)


QUANTITIES: dict[str, Variable] = {
    "N": total(),
    "N_active": lambda observations: np.log(observations.active),
    "K": needed(),
    "N/K": stored_per_needed,
    "E/A": expert_share,
    "G": granularity,
    "S": zeros_per_nonzero,
    "D": tokens(),
}
"""The quantities that a form can need, by the letter that messages use."""
