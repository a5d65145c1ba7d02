"""Sets of features that all tokens of an expert share: chosen by energy, the sum of squares over the expert's tokens.

N routed tokens, E experts, D features, K selected features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.sparsity.topk import topk_mask


class FeatureSets(NamedTuple):
    """The selected features of every expert as indices, in ascending order."""

    index_EK: Tensor
    """int64; K is the largest number of any expert."""
    used_EK: Tensor | None
    """Bool: whether the position belongs to the set, for experts with fewer features; None if all have K."""


def energies(x_ND: Tensor, expert_N: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the energy of every feature over the rows of each expert ``(E, D)`` and the number of rows ``(E,)``.

    Both are detached sums in float64, which can be added over micro-batches and ranks.

    Args:
        x_ND: the rows.
        expert_N: the expert of each row; None: all rows belong to the only one.
        num_experts: E.
    """
    x_ND = x_ND.detach().to(torch.promote_types(x_ND.dtype, torch.float32))
    if expert_N is None:
        rows_E = torch.full((1,), len(x_ND), dtype=torch.float64, device=x_ND.device)
        return x_ND.square().sum(0, keepdim=True, dtype=torch.float64), rows_E
    # A product, because index_add_ adds in no fixed order on a GPU, and the sets must not depend on it.
    belongs_EN = expert_N == torch.arange(num_experts, device=x_ND.device)[:, None]
    energy_ED = belongs_EN.to(x_ND.dtype) @ x_ND.square()
    return energy_ED.double(), belongs_EN.sum(1).double()


def shared_mask(energy_ED: Tensor, num_selected: int | Tensor) -> Tensor:
    """Mark the features with the largest energy of every expert, ties to the lower index.

    Args:
        energy_ED: sums or means; not negative.
        num_selected: K, an int or one per expert ``(E,)``.

    Returns:
        ``(E, D)`` bool, exactly K true per expert.
    """
    return topk_mask(energy_ED, num_selected)


def feature_sets(energy_ED: Tensor, num_selected: int | Tensor, largest: int) -> FeatureSets:
    """Return the features of ``shared_mask`` as indices, without a synchronization with the device.

    Args:
        energy_ED: as in ``shared_mask``.
        num_selected: as in ``shared_mask``.
        largest: the largest K of any expert.
    """
    # Stable, so that ties go to the lower index; on a GPU the order of topk among equals is not defined.
    ranked_EK = energy_ED.argsort(dim=-1, descending=True, stable=True)[:, :largest]
    index_EK, position_EK = ranked_EK.sort(-1)
    if isinstance(num_selected, int):
        return FeatureSets(index_EK, None)
    return FeatureSets(index_EK, position_EK < num_selected[:, None])


def updated_means(mean_ED: Tensor, energy_ED: Tensor, rows_E: Tensor, decay: float) -> Tensor:
    """Return the running averages of the energy per row after a measurement.

    An expert without rows, or with an energy that is not finite, keeps its averages. Averages that are all zero have
    not been measured yet, and become the measurement itself.

    Args:
        mean_ED: the averages.
        energy_ED: sums over the rows of a step, of all ranks.
        rows_E: number of rows.
        decay: weight of the old value.
    """
    measured_ED = (energy_ED / rows_E[:, None].clamp(min=1.0)).to(mean_ED)
    is_first_E1 = (mean_ED == 0).all(-1, keepdim=True)
    blended_ED = torch.where(is_first_E1, measured_ED, mean_ED.lerp(measured_ED, 1.0 - decay))
    is_valid_E = (rows_E > 0).to(mean_ED.device) & energy_ED.to(mean_ED.device).isfinite().all(-1)
    return torch.where(is_valid_E[:, None], blended_ED, mean_ED)
