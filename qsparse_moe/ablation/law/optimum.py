"""The S at which a law's loss is least while the parameters that a token uses stay the same, and how flat it is there.

As in the Q-Sparse paper: ``N_a = N (1 − S)`` is fixed, so a sparser model stores more. Terms that change with neither N
nor S play no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qsparse_moe.ablation.law.forms import Design, Form
from qsparse_moe.ablation.law.observations import Array, imagined

_STEP = 5e-4
GRID = np.arange(0.0, 0.95 + _STEP / 2, _STEP)
"""S among which the optimum is sought; beyond 0.95 no law has seen a run."""


@dataclass(frozen=True)
class Optimum:
    """S* and the shape of the loss around it."""

    sparsity: float
    at_edge: bool
    """Whether it is an end of the range searched: 0, where sparsity never pays, or 0.95."""
    band: tuple[float, float]
    """S around it at which the reducible loss is within the tolerance of its least."""
    dense_excess: float
    """By which share of the least reducible loss the dense model of as many used parameters is worse."""
    worse_than_dense_beyond: float | None
    """The S from which on sparsity loses; None where it never does."""


def find_optimum(form: Form, theta: Array, *, kept: float, expert_share: float, tolerance: float) -> Optimum:
    """The optimum of a law with S in it.

    Args:
        form: a form that has S.
        theta: its constants.
        kept: parameters that a token uses after routing and Q-Sparse; held fixed.
        expert_share: A/E.
        tolerance: of the reducible loss, for the band.
    """
    reducible = Design.of(form, imagined(kept=kept, expert_share=expert_share, sparsity=GRID)).reducible(theta)
    least = int(reducible.argmin())
    return Optimum(
        sparsity=_vertex(reducible, least),
        at_edge=least in (0, len(GRID) - 1),
        band=_band(reducible, least, (1 + tolerance) * reducible[least]),
        dense_excess=float(reducible[0] / reducible[least] - 1),
        worse_than_dense_beyond=_crossing(reducible, least),
    )


def _vertex(values: Array, least: int) -> float:
    """The lowest point of the parabola through the least value of the grid and its neighbours."""
    if least in (0, len(values) - 1):
        return float(GRID[least])
    before, at, after = values[least - 1 : least + 2]
    bend = before - 2 * at + after
    return float(GRID[least] + _STEP * (before - after) / (2 * bend)) if bend > 0 else float(GRID[least])


def _band(values: Array, least: int, most: float) -> tuple[float, float]:
    outside = np.flatnonzero(values > most)
    below, above = outside[outside < least], outside[outside > least]
    low = below[-1] + 1 if len(below) else 0
    high = above[0] - 1 if len(above) else len(GRID) - 1
    return float(GRID[low]), float(GRID[high])


def _crossing(values: Array, least: int) -> float | None:
    worse = np.flatnonzero(values[least:] > values[0])
    return float(GRID[least + worse[0]]) if len(worse) else None
