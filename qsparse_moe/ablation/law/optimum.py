"""Find the S of the least loss at a fixed number of needed parameters, and the width of the minimum.

As in the Q-Sparse paper, ``N_a = N (1 − S)`` is fixed, so that a sparser model stores more parameters. Terms that
depend on neither N nor S have no influence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qsparse_moe.ablation.law.forms import Design, Form
from qsparse_moe.ablation.law.observations import Array, imagined

_STEP = 5e-4
# np.arange leaves out its end, and half a step beyond 0.95 includes it.
GRID = np.arange(0.0, 0.95 + _STEP / 2, _STEP)
"""Candidates for the optimum. The range ends at 0.95 because no law here was fitted to sparser runs."""


@dataclass(frozen=True)
class Optimum:
    """S* and the shape of the loss around it."""

    sparsity: float
    at_edge: bool
    """True if S* is an end of the range searched: 0, where sparsity never pays off, or 0.95."""
    band: tuple[float, float]
    """Range of S around S* in which the reducible loss is within the tolerance of its minimum."""
    dense_excess: float
    """Excess of the dense model with the same number of needed parameters, as a share of the least reducible loss."""
    worse_than_dense_beyond: float | None
    """The S beyond which the sparse model is worse than the dense one; None if it never is."""


def find_optimum(
    form: Form, theta: Array, *, needed: float, expert_share: float, tolerance: float, tokens: float = 1e9
) -> Optimum:
    """Return the optimum of a law that depends on S.

    Args:
        form: a form that depends on S.
        theta: its constants.
        needed: number of parameters per token after routing and Q-Sparse, which is fixed.
        expert_share: A/E.
        tolerance: width of the band, as a share of the reducible loss.
        tokens: length of the run, which matters if the cost of S depends on it.
    """
    models = imagined(needed=needed, expert_share=expert_share, sparsity=GRID, tokens=tokens)
    reducible = Design.of(form, models).reducible(theta)
    least = int(reducible.argmin())
    return Optimum(
        sparsity=_vertex(reducible, least),
        at_edge=least in (0, len(GRID) - 1),
        band=_band(reducible, least, (1 + tolerance) * reducible[least]),
        dense_excess=float(reducible[0] / reducible[least] - 1),
        worse_than_dense_beyond=_crossing(reducible, least),
    )


def _vertex(values: Array, least: int) -> float:
    """Return the vertex of the parabola through the least value of the grid and its neighbours."""
    if least in (0, len(values) - 1):
        return float(GRID[least])
    before, at, after = values[least - 1 : least + 2]
    bend = before - 2 * at + after
    # The parabola resolves S* below the spacing of the grid, where a flat minimum would otherwise jump.
    return float(GRID[least] + _STEP * (before - after) / (2 * bend)) if bend > 0 else float(GRID[least])


def _band(values: Array, least: int, most: float) -> tuple[float, float]:
    outside = np.flatnonzero(values > most)
    below, above = outside[outside < least], outside[outside > least]
    low = below[-1] + 1 if len(below) else 0
    high = above[0] - 1 if len(above) else len(GRID) - 1
    return float(GRID[low]), float(GRID[high])


def _crossing(values: Array, least: int) -> float | None:
    # Sought above the minimum only: below it, every S is at most as bad as dense.
    worse = np.flatnonzero(values[least:] > values[0])
    return float(GRID[least + worse[0]]) if len(worse) else None
