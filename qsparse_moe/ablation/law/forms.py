"""Forms of a law: sums of terms, each a positive coefficient times powers.

Every form here is ``L = Σ_m ± c_m · exp(Σ_k p_k · v_mk)``: a coefficient ``c``, and exponents ``p`` over variables
``v`` that the run gives, such as ``−ln N`` for ``N^−α`` and ``1/(1−S)`` for ``exp(β/(1−S))``. So one evaluation, one
exact gradient and one way to find starts serve all of them.

M terms, C coefficients, K exponents, P = C + K constants, n observations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qsparse_moe.ablation.law.observations import Array, Observations

Variable = Callable[[Observations], Array]

# Further out no term matters any more, and the powers of such constants overflow.
_LOG_COEFFICIENT = (-80.0, 80.0)
_LOG_EXPONENT = (-12.0, 4.0)
_SIGNED_EXPONENT = (-20.0, 20.0)


@dataclass(frozen=True)
class Term:
    """``sign · coefficient · exp(Σ exponent · variable)``."""

    coefficient: str
    powers: Mapping[str, Variable] = field(default_factory=dict)
    """By the exponent's name, the variable that it is multiplied with."""
    sign: int = 1


@dataclass(frozen=True)
class Form:
    """A law without values for its constants."""

    name: str
    formula: str
    source: str
    terms: tuple[Term, ...]
    starts: Mapping[str, tuple[float, ...]]
    """By exponent, the values that the grid of starts combines; coefficients follow from them."""
    needs: Mapping[str, int]
    """By quantity (a key of ``QUANTITIES``), how many different values tell its constants."""
    signed: frozenset[str] = frozenset()
    """Exponents that may be negative; all other constants are positive."""
    by_size: frozenset[str] = frozenset()
    """Coefficients of the terms that change with N and S: what a choice of S can reduce."""
    printed: Mapping[str, float] = field(default_factory=dict)
    """The constants as its source prints them."""
    printed_unit: str = ""
    """The unit of the loss that they belong to."""

    @property
    def coefficients(self) -> tuple[str, ...]:
        """In the order in which the terms name them."""
        return tuple(dict.fromkeys(term.coefficient for term in self.terms))

    @property
    def exponents(self) -> tuple[str, ...]:
        """In the order of ``starts``."""
        return tuple(self.starts)

    @property
    def constants(self) -> tuple[str, ...]:
        """Coefficients, then exponents: the order of a ``theta``."""
        return self.coefficients + self.exponents

    @property
    def has_sparsity(self) -> bool:
        """Whether S is in it."""
        return "S" in self.needs

    def theta(self, constants: Mapping[str, float]) -> Array:
        """``(P,)`` constants as the fit moves them: logarithms, and signed exponents as they are."""
        return np.array([constants[c] if c in self.signed else np.log(constants[c]) for c in self.constants])

    def values(self, theta: Array) -> dict[str, float]:
        """The constants of a ``theta``, by name."""
        theta = np.clip(theta, *self.bounds)
        both = zip(self.constants, theta, strict=True)
        return {name: float(value if name in self.signed else np.exp(value)) for name, value in both}

    @property
    def bounds(self) -> tuple[Array, Array]:
        """``(P,)`` and ``(P,)``: between which a ``theta`` is taken, so that every term can be computed."""
        bounds = [_LOG_COEFFICIENT] * len(self.coefficients)
        bounds += [_SIGNED_EXPONENT if name in self.signed else _LOG_EXPONENT for name in self.exponents]
        low, high = zip(*bounds, strict=True)
        return np.array(low), np.array(high)

    def loss(self, constants: Mapping[str, float], observations: Observations) -> Array:
        """``(n,)`` losses that the law with these constants gives."""
        return Design.of(self, observations).loss(self.theta(constants))


@dataclass(frozen=True)
class Design:
    """A form at given observations: all that does not change while its constants are sought."""

    form: Form
    variables_KMn: Array
    """Zero where a term lacks the exponent."""
    sign_CM: Array
    """The sign of a term at its coefficient, 0 at the others."""
    signed_K: NDArray[np.bool_]
    bounds: tuple[Array, Array]

    @classmethod
    def of(cls, form: Form, observations: Observations) -> Design:
        """The variables of every term, computed once."""
        variables = np.zeros((len(form.exponents), len(form.terms), len(observations)))
        signs = np.zeros((len(form.coefficients), len(form.terms)))
        for m, term in enumerate(form.terms):
            signs[form.coefficients.index(term.coefficient), m] = term.sign
            for name, variable in term.powers.items():
                variables[form.exponents.index(name), m] = variable(observations)
        return cls(form, variables, signs, np.array([name in form.signed for name in form.exponents]), form.bounds)

    def basis(self, exponents_K: Array) -> Array:
        """``(C, n)`` what each coefficient is multiplied with, at given exponents."""
        return self.sign_CM @ self._powers(exponents_K)

    def loss(self, theta: Array) -> Array:
        """``(n,)``."""
        coefficients_C, exponents_K, _ = self._constants(theta)
        return coefficients_C @ self.basis(exponents_K)

    def reducible(self, theta: Array) -> Array:
        """``(n,)`` the terms that change with N and S alone."""
        coefficients_C, exponents_K, _ = self._constants(theta)
        by_size = np.array([name in self.form.by_size for name in self.form.coefficients])
        return (coefficients_C * by_size) @ self.basis(exponents_K)

    def log_loss_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """``(n,)`` ln L and ``(P, n)`` its derivative by every entry of ``theta``."""
        coefficients_C, exponents_K, slopes_K = self._constants(theta)
        powers_Mn = self._powers(exponents_K)
        by_coefficient_Cn = coefficients_C[:, None] * (self.sign_CM @ powers_Mn)
        terms_Mn = (coefficients_C @ self.sign_CM)[:, None] * powers_Mn
        by_exponent_Kn = slopes_K[:, None] * np.einsum("kmn,mn->kn", self.variables_KMn, terms_Mn)
        loss_n = terms_Mn.sum(0)
        return np.log(loss_n), np.concatenate([by_coefficient_Cn, by_exponent_Kn]) / loss_n

    def _powers(self, exponents_K: Array) -> Array:
        """``(M, n)``, every term without its coefficient."""
        _, num_terms, num_points = self.variables_KMn.shape
        return np.exp(exponents_K @ self.variables_KMn.reshape(-1, num_terms * num_points)).reshape(num_terms, -1)

    def _constants(self, theta: Array) -> tuple[Array, Array, Array]:
        """Coefficients, exponents, and the derivative of each exponent by its entry of ``theta``."""
        theta = np.clip(theta, *self.bounds)
        split = len(self.sign_CM)
        signed, exponents = self.signed_K, theta[split:]
        exponents_K = np.where(signed, exponents, np.exp(np.where(signed, 0.0, exponents)))
        return np.exp(theta[:split]), exponents_K, np.where(signed, 1.0, exponents_K)


def total(unit: float = 1.0) -> Variable:
    """``−ln N`` of all parameters, in ``unit``: the variable of ``N^−α``."""
    return lambda observations: -np.log(observations.total / unit)


def tokens(unit: float = 1.0) -> Variable:
    """``−ln D``, in ``unit``: the variable of ``D^−β``."""
    return lambda observations: -np.log(observations.tokens / unit)


def kept(unit: float = 1.0) -> Variable:
    """``−ln K`` of the kept parameters, in ``unit``."""
    return lambda observations: -np.log(observations.kept / unit)


def expert_share(observations: Observations) -> Array:
    """``−ln(1−s) = −ln(A/E)``: the variable of ``(1−s)^−δ``."""
    return -np.log(observations.expert_share)


def stored_for_kept(observations: Observations) -> Array:
    """``−ln(N/K)``: parameters stored for each that is kept."""
    return -np.log(observations.total / observations.kept)


def granularity(observations: Observations) -> Array:
    """``−ln G``."""
    return -np.log(observations.granularity)


def density(observations: Observations) -> Array:
    """``1/(1−S)``: the variable of ``exp(β/(1−S))``."""
    return 1.0 / (1.0 - observations.sparsity)


def dropped_for_kept(observations: Observations) -> Array:
    """``S/(1−S)``: the same variable, 0 for a dense model."""
    return observations.sparsity / (1.0 - observations.sparsity)


QUANTITIES: dict[str, Variable] = {
    "N": total(),
    "N_active": lambda observations: np.log(observations.active),
    "K": kept(),
    "N/K": stored_for_kept,
    "E/A": expert_share,
    "G": granularity,
    "S": dropped_for_kept,
    "D": tokens(),
}
"""What a form can need, by the letter that messages use."""
