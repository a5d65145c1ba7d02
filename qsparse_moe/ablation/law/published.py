"""The published laws as forms, with the constants and units of their papers.

None contains both expert sparsity and activation sparsity; ``joint.py`` has forms that do.
"""

from __future__ import annotations

import itertools

import numpy as np

from qsparse_moe.ablation.law import forms
from qsparse_moe.ablation.law.forms import Form, Term
from qsparse_moe.ablation.law.observations import Array, Observations

Q_SPARSE = Form(
    name="q-sparse",
    formula="L = E + (B + C exp(beta/(1-S))) / N^alpha,  N in 1e8",
    source="Q-Sparse, arXiv 2407.10969",
    terms=(
        Term("E"),
        Term("B", {"alpha": forms.total(1e8)}),
        Term("C", {"alpha": forms.total(1e8), "beta": forms.density}),
    ),
    starts={"alpha": (0.05, 0.1, 0.2, 0.4, 0.8), "beta": (0.01, 0.05, 0.2, 0.5)},
    # Three values are the fewest that determine an exponent, its coefficient, and a constant beside them.
    needs={"N": 3, "S": 3},
    by_size=frozenset({"B", "C"}),
    printed={"E": 1.86, "B": 0.01, "C": 1.89, "alpha": 0.10, "beta": 0.05},
    printed_unit="bits per token",
)

FINE_GRAINED = Form(
    name="fine-grained-moe",
    formula="L = c + (g/G^gamma + a) / N^alpha + b/D^beta",
    source="arXiv 2402.07871",
    terms=(
        Term("c"),
        Term("g", {"gamma": forms.granularity, "alpha": forms.total()}),
        Term("a", {"alpha": forms.total()}),
        Term("b", {"beta": forms.tokens()}),
    ),
    starts={"gamma": (0.2, 0.6, 1.2), "alpha": (0.1, 0.2, 0.4, 0.8), "beta": (0.1, 0.2, 0.4, 0.8)},
    needs={"N": 3, "G": 3, "D": 3},
    by_size=frozenset({"g", "a"}),
    printed={"c": 0.47, "g": 2.1, "a": 18.1, "b": 30.8, "gamma": 0.58, "alpha": 0.115, "beta": 0.147},
    printed_unit="nats per token",
)

# As printed in arXiv 2502.05172.
_E_START, _E_MAX = 2.0732, 290.4521


def effective_experts(observations: Observations) -> Array:
    """Return ``ln Ê`` of the joint MoE law, with E/A in place of its E, because its models use one expert per token.

    ``1/Ê = 1/(E − 1 + (1/E_start − 1/E_max)^-1) + 1/E_max``, which is E_start for a dense model and at most E_max.
    """
    beyond_dense = 1.0 / observations.expert_share - 1.0
    return -np.log(1.0 / (beyond_dense + 1.0 / (1.0 / _E_START - 1.0 / _E_MAX)) + 1.0 / _E_MAX)


def _by_experts(of: forms.Variable) -> forms.Variable:
    return lambda observations: of(observations) * effective_experts(observations)


def _log_active(observations: Observations) -> Array:
    return np.log(observations.active)


def _log_tokens(observations: Observations) -> Array:
    return np.log(observations.tokens)


JOINT_MOE = Form(
    name="joint-moe",
    formula="L = a Ê^delta N_active^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c",
    source="arXiv 2502.05172",
    terms=(
        Term("a", {"delta": effective_experts, "alpha": _log_active, "gamma": _by_experts(_log_active)}),
        Term("b", {"omega": effective_experts, "beta": _log_tokens, "zeta": _by_experts(_log_tokens)}),
        Term("c"),
    ),
    starts={
        "delta": (-0.2, 0.0),
        "alpha": (-0.1, -0.2, -0.4, -0.8),
        # The two interactions start at 0: their printed constants are small beside those of the exponents that they
        # change.
        "gamma": (0.0,),
        "omega": (0.0, 0.5),
        "beta": (-0.1, -0.2, -0.4, -0.8),
        "zeta": (0.0,),
    },
    needs={"N_active": 3, "E/A": 3, "D": 3},
    # The paper writes N^alpha where the other laws divide, so that the exponents of a falling loss are negative.
    signed=frozenset({"delta", "alpha", "gamma", "omega", "beta", "zeta"}),
    by_size=frozenset({"a"}),
    printed={
        "a": 35.91,
        "b": 35.98,
        "c": 1.3637,
        "delta": -0.2285,
        "alpha": -0.1889,
        "gamma": 0.0098,
        "omega": 0.5529,
        "beta": -0.1775,
        "zeta": -0.0259,
    },
    printed_unit="nats per token",
)

EXPERT_SPARSITY = Form(
    name="expert-sparsity",
    formula="L = a/N^alpha + b/D^beta + c/(1-s)^lambda + d/((1-s)^delta N^gamma) + e,  1-s = A/E",
    source="arXiv 2501.12370",
    terms=(
        Term("a", {"alpha": forms.total()}),
        Term("b", {"beta": forms.tokens()}),
        Term("c", {"lambda": forms.expert_share}),
        Term("d", {"delta": forms.expert_share, "gamma": forms.total()}),
        Term("e"),
    ),
    starts={
        "alpha": (0.3, 0.6, 1.0),
        "beta": (0.15, 0.4, 0.8),
        "lambda": (-0.2, 0.1),
        "delta": (0.1, 0.4),
        "gamma": (0.1, 0.2, 0.5),
    },
    needs={"N": 3, "E/A": 3, "D": 3},
    signed=frozenset({"lambda", "delta"}),
    by_size=frozenset({"a", "d"}),
    printed={
        "a": 16612.5,
        "b": 5455.67,
        "c": 0.4598,
        "d": 17.26,
        "e": 0.94,
        "alpha": 0.5962,
        "beta": 0.3954,
        "lambda": -0.1666,
        "delta": 0.1603,
        "gamma": 0.1595,
    },
    printed_unit="nats per token",
)

PUBLISHED = (Q_SPARSE, FINE_GRAINED, JOINT_MOE, EXPERT_SPARSITY)
"""All published forms."""

PUBLISHED_OPTIMUM = {"full precision": 0.4558, "1.58-bit": 0.6125}
"""S* as stated in the Q-Sparse paper, which does not publish the constants of its 1.58-bit law."""
_ROUNDED_BY = 0.005  # B, C, alpha and beta are printed with two decimals


def rounding_corners() -> list[dict[str, float]]:
    """Return the Q-Sparse constants at the corners of the box of values that round to the printed ones."""
    names = ("B", "C", "alpha", "beta")
    ends = itertools.product((-_ROUNDED_BY, _ROUNDED_BY), repeat=len(names))
    return [
        {"E": Q_SPARSE.printed["E"]} | {n: Q_SPARSE.printed[n] + by for n, by in zip(names, offsets, strict=True)}
        for offsets in ends
    ]
