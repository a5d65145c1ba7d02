"""The capacity of an expert: which of the tokens routed to it are processed, and which are dropped.

T tokens, A experts per token, N = T * A routed tokens, E experts.

An expert processes the tokens with the largest router weights: the policy ``probs``, the default of Megatron-Core and
DeepSpeed. The other common policy processes the first ones in the batch, and so drops mostly the ends of the last
sequences.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def expert_capacity(factor: float, num_choices: int, num_experts: int) -> int:
    """Return ``ceil(factor * N / E)``, at least 1 (arXiv 2101.03961, eq. 3, for A choices per token).

    The factor is taken as the decimal number that was written: 1.1 times 100 is exactly 110.
    """
    # A product of floats would be slightly above 110, and its ceiling 111.
    return math.ceil(Fraction(str(factor)) * num_choices / num_experts)


def within_capacity_reference(weights_TA: Tensor, expert_ids_TA: Tensor, capacity: int) -> Tensor:
    """Return ``(T, A)`` bool: true for each expert's ``capacity`` largest weights; among equal ones the first win."""
    weights, experts = weights_TA.flatten().tolist(), expert_ids_TA.flatten().tolist()
    within = [False] * len(weights)
    for expert in set(experts):
        choices = [choice for choice, chosen in enumerate(experts) if chosen == expert]
        for choice in sorted(choices, key=lambda choice: (-weights[choice], choice))[:capacity]:
            within[choice] = True
    return torch.tensor(within, device=weights_TA.device).view_as(expert_ids_TA)


def within_capacity(weights_TA: Tensor, expert_ids_TA: Tensor, capacity: int) -> Tensor:
    """Compute ``within_capacity_reference`` by sorting; nothing is copied to the host."""
    expert_N = expert_ids_TA.flatten()
    # Detached, because which tokens are dropped has no gradient.
    by_weight_N = weights_TA.detach().flatten().argsort(descending=True, stable=True)
    # The second sort is stable, so within an expert the order by weight remains.
    sorted_N, order_N = expert_N[by_weight_N].sort(stable=True)
    # searchsorted returns where each expert begins, so the difference is the rank of a token within its expert.
    rank_N = torch.arange(len(expert_N), device=expert_N.device) - torch.searchsorted(sorted_N, sorted_N)
    within_N = torch.empty_like(expert_N, dtype=torch.bool)
    within_N[by_weight_N[order_N]] = rank_N < capacity
    return within_N.view_as(expert_ids_TA)
