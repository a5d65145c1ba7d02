"""Candidate forms of the joint law of model size, expert sparsity, activation sparsity and tokens.

N parameters stored and K needed per token, both in 1e6 and without embedding and head; 1−s = A/E; S the fraction of
activations zeroed; D tokens in 1e6. The units keep the constants of small runs near 1, which conditions the fit well.
No paper has such a law; each candidate states another way in which the two sparsities could interact.
"""

from __future__ import annotations

from qsparse_moe.ablation.law import forms
from qsparse_moe.ablation.law.forms import Form, Term

_MILLION = 1e6
_N, _K, _D = forms.total(_MILLION), forms.needed(_MILLION), forms.tokens(_MILLION)
# Starting values around the exponents of published laws, spaced by about a factor of two.
_ALPHA = (0.1, 0.3, 0.6, 1.0)
_NU = (0.15, 0.3, 0.6, 1.0)
_BETA = (0.02, 0.1, 0.4)

PRODUCT = Form(
    name="product",
    formula="L = E + (B + C exp(beta/(1-S))) / (N^alpha (1-s)^delta) + b/D^nu,  N and D in 1e6",
    source="the N-term of a MoE law times A(S) of Q-Sparse: S costs the same share for every (E, A)",
    terms=(
        Term("E"),
        Term("B", {"alpha": _N, "delta": forms.expert_share}),
        Term("C", {"alpha": _N, "delta": forms.expert_share, "beta": forms.density}),
        Term("b", {"nu": _D}),
    ),
    starts={"alpha": _ALPHA, "delta": (0.0, 0.1, 0.3), "beta": _BETA, "nu": _NU},
    needs={"N": 3, "E/A": 2, "S": 3, "D": 3},
    signed=frozenset({"delta"}),
    by_size=frozenset({"B", "C"}),
)

KEPT = Form(
    name="kept",
    formula="L = E + a exp(beta S/(1-S)) / (K^alpha (N/K)^delta) + b/D^nu,  K and D in 1e6",
    source="a law in needed parameters: parameters that are stored but not used help equally under either sparsity",
    terms=(
        Term("E"),
        Term("a", {"alpha": _K, "delta": forms.stored_per_needed, "beta": forms.zeros_per_nonzero}),
        Term("b", {"nu": _D}),
    ),
    starts={"alpha": _ALPHA, "delta": (0.0, 0.1, 0.3), "beta": _BETA, "nu": _NU},
    needs={"K": 3, "N/K": 3, "S": 3, "D": 3},
    signed=frozenset({"delta"}),
    by_size=frozenset({"a"}),
)

_PENALTY = {"gamma": _N, "eta": forms.expert_share}

# h occurs twice: exp(.) - 1 makes the penalty zero for a dense model.
ADDITIVE = Form(
    name="additive",
    formula=(
        "L = E + a/(N^alpha (1-s)^delta) + h (exp(beta S/(1-S)) - 1)/(N^gamma (1-s)^eta) + b/D^nu,  N and D in 1e6"
    ),
    source="the cost of S is a separate term, which may shrink with N and grow with s at its own rates",
    terms=(
        Term("E"),
        Term("a", {"alpha": _N, "delta": forms.expert_share}),
        Term("h", _PENALTY | {"beta": forms.zeros_per_nonzero}),
        Term("h", _PENALTY, sign=-1),
        Term("b", {"nu": _D}),
    ),
    starts={
        "alpha": _ALPHA,
        "delta": (0.0, 0.2),
        "beta": (0.05, 0.4),
        "gamma": (0.1, 0.5),
        "eta": (0.0,),
        "nu": _NU,
    },
    needs={"N": 3, "E/A": 2, "S": 3, "D": 3},
    signed=frozenset({"delta", "eta"}),
    by_size=frozenset({"a", "h"}),
)

_COST_BY_LENGTH = {"kappa": forms.token_growth(_MILLION)}

# sqrt(D) and not ln D: the losses of short runs fall faster than any power of the tokens, at first slowly and then
# faster. The lab log has the shapes that were tried (2026-11-29).
LENGTH = Form(
    name="length",
    formula=(
        "L = E + a/(N^alpha (1-s)^delta) + h (exp(beta S/(1-S)) - 1) D^kappa + b exp(-lambda sqrt(D))/D^(zeta ln N),  "
        "N and D in 1e6"
    ),
    source="the cost of S is a separate term, which may grow with the length of the run",
    terms=(
        Term("E"),
        Term("a", {"alpha": _N, "delta": forms.expert_share}),
        Term("h", _COST_BY_LENGTH | {"beta": forms.zeros_per_nonzero}),
        Term("h", _COST_BY_LENGTH, sign=-1),
        Term("b", {"lambda": forms.root_of_tokens(_MILLION), "zeta": forms.size_and_tokens(_MILLION)}),
    ),
    starts={
        "alpha": _ALPHA,
        "delta": (0.0, 0.2),
        "beta": (0.05, 0.4),
        "kappa": (0.0, 0.7),
        "lambda": (0.3, 1.0, 3.0),
        "zeta": (0.0,),
    },
    needs={"N": 3, "E/A": 2, "S": 3, "D": 3},
    signed=frozenset({"delta", "kappa", "zeta"}),
    by_size=frozenset({"a", "h"}),
)

JOINT = (PRODUCT, KEPT, ADDITIVE, LENGTH)
"""All candidate forms."""
