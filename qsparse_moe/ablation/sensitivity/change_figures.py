"""The figures of changes of a model: mean change of the loss, estimated and evaluated, with intervals over documents.

P changes, C documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qsparse_moe.ablation.sensitivity.documents import bootstrap_intervals
from qsparse_moe.data.packing import Array


def change_figures(
    first_PC: Array, second_PC: Array, exact_PC: Array | None, labels_C: Array, draws: int
) -> list[dict[str, Any]]:
    """Return the fields that ``CellChange`` and ``RoutingChange`` have in common, one mapping per change.

    Args:
        first_PC: the first-order terms, summed over the labels of each document.
        second_PC: the second-order terms.
        exact_PC: the evaluated changes; None if nothing was evaluated.
        labels_C: number of labels per document.
        draws: number of bootstrap resamples over documents.
    """
    total, both_PC = labels_C.sum(), first_PC + second_PC
    # One set of resamples for all changes, so that their intervals are comparable.
    low_P, high_P = bootstrap_intervals(both_PC, labels_C, draws=draws)
    found: list[dict[str, Any]] = [
        {
            "estimate": float(both_PC[i].sum() / total),
            "estimate_interval": (float(low_P[i]), float(high_P[i])),
            "first_order": float(first_PC[i].sum() / total),
            "exact": None,
            "exact_interval": None,
            "exact_halves": None,
        }
        for i in range(len(both_PC))
    ]
    if exact_PC is None:
        return found
    low_P, high_P = bootstrap_intervals(exact_PC, labels_C, draws=draws)
    halves_P2 = _halves(exact_PC, labels_C)
    for i, figures in enumerate(found):
        figures["exact"] = float(exact_PC[i].sum() / total)
        figures["exact_interval"] = float(low_P[i]), float(high_P[i])
        figures["exact_halves"] = float(halves_P2[i, 0]), float(halves_P2[i, 1])
    return found


def _halves(sums_PC: Array, labels_C: Array) -> Array:
    """Return the mean change over every second document and over the others, ``(P, 2)``; nan with a single document.

    Alternating documents, not the first and the second half: neighbours in the text may be alike.
    """
    with np.errstate(invalid="ignore"):
        return np.stack([sums_PC[:, part::2].sum(1) / labels_C[part::2].sum() for part in (0, 1)], axis=1)
