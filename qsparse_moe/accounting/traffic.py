"""Count the bytes of weights that one step of B tokens reads in generation, whose speed memory limits.

A weight is read once per step if any of the step's tokens needs it, so what counts is the union over the tokens. For
tokens that choose independently, a weight that a token needs with probability p is read with 1 - (1 - p)^B. In front of
an expert p is the product of the router's A / E and the density d of the site, (A / E) d: a dense model with d = 0.5 is
at 0.94 by B = 4, an expert that sees few of the tokens stays low until B comes near E / A. Real tokens are not
independent: what a model really reads is measured (``model/unions.py``).

Under a gate with a ReLU (relu2glu, reglu, drelu) the up product is needed only where the gate is positive, if the gate
is computed first: p of an element of ``w_up`` is then d times the gate's share of positive values.

E experts, A experts per token, B tokens per step. Where the plan uses fewer experts per token, A is their number.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from qsparse_moe.accounting.densities import Densities, planned_densities
from qsparse_moe.accounting.parameters import Weight, model_weights
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import vocab_size

RELU_GATES = frozenset({"relu2glu", "reglu", "drelu"})


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights read in one step of B tokens."""

    stored: float
    """Bytes of all weights, which a dense model of that size reads."""
    routed: float
    """Bytes of all weights of every expert that a token of the step selects, and of the rest of the model."""
    needed: float
    """Bytes of those rows (and with the gate first, elements of up) of ``routed`` that some token's features need."""


def weight_traffic(
    config: ModelConfig,
    batch: int,
    densities: Densities | None = None,
    *,
    bytes_per_weight: float = 2.0,
    gate_density: float | None = None,
) -> dict[str, Traffic]:
    """Return the bytes read in one step of ``batch`` independent tokens, by part of the model.

    Args:
        config: the model.
        batch: B, tokens of one step, at least 1.
        densities: share of nonzero features by layer and site; None: the plan of the config.
        bytes_per_weight: 2 in bf16; a ternary matrix packed takes a quarter of a byte.
        gate_density: share of positive gate values, to count up with the gate first; None: up is read in whole rows.
    """
    densities = densities or planned_densities(config)
    parts: dict[str, Traffic] = {}
    for weight in model_weights(config, densities=densities):
        before = parts.get(weight.part, Traffic(0.0, 0.0, 0.0))
        routed, needed = _union(config, weight, batch, densities, gate_density)
        parts[weight.part] = Traffic(
            before.stored + bytes_per_weight * weight.stored,
            before.routed + bytes_per_weight * routed,
            before.needed + bytes_per_weight * needed,
        )
    return parts


def total_traffic(parts: dict[str, Traffic]) -> Traffic:
    """Return the sum over the parts."""
    return Traffic(*(sum(getattr(part, name) for part in parts.values()) for name in ("stored", "routed", "needed")))


def union(probability: float, batch: int) -> float:
    """Return ``1 - (1 - p)^B``: the probability that at least one of ``batch`` independent tokens needs a weight.

    Each token needs it with ``probability`` p.
    """
    # log1p of -1 is not finite.
    if probability >= 1.0:
        return 1.0
    # In this form a small p keeps its digits, which 1 - (1 - p) ** B would round away.
    return -math.expm1(batch * math.log1p(-probability))


def _union(
    config: ModelConfig, weight: Weight, batch: int, densities: Densities, gate_density: float | None
) -> tuple[float, float]:
    """Return the elements read with routing alone, and with Q-Sparse."""
    if weight.part == "embedding":
        # At most one row per token. Real tokens repeat, so this is an upper limit.
        rows = min(batch, vocab_size(config)) * config.hidden_size
        return rows, rows
    size = weight.stored or weight.active  # a tied head is read and not stored
    if weight.site is None:
        return size, size
    chosen = weight.active / size
    if config.sparsity.selection == "shared":
        # One set for all tokens of an expert: the batch reads no more of a matrix than one token.
        read = size * union(chosen, batch)
        return read, read * weight.needed / max(weight.active, 1)
    gated = gate_density if gate_density is not None and weight.name.endswith("w_up") else 1.0
    # Only a gate with a ReLU has values that are exactly zero.
    if config.moe.activation not in RELU_GATES:
        gated = 1.0
    shares = densities[weight.layer, weight.site]
    # Counted by value, because hundreds of experts have a few distinct densities.
    needed = sum(number * union(chosen * share * gated, batch) for share, number in Counter(shares).items()) / len(
        shares
    )
    return size * union(chosen, batch), size * needed
