"""Which routed rows an expert has no room for. T tokens, A experts a token, N = T * A choices, E experts.

Of those that choose an expert it takes the largest router weights: the policy ``probs``, the default of Megatron-Core
and of DeepSpeed. The other usual one takes the first in the batch, and so drops the ends of the last rows.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def expert_capacity(factor: float, num_choices: int, num_experts: int) -> int:
    """``ceil(factor * N / E)``, at least 1, of the factor as it is written: 1.1 times 100 is 110 and not a bit more."""
    return math.ceil(Fraction(str(factor)) * num_choices / num_experts)


def within_capacity_reference(weights_TA: Tensor, expert_ids_TA: Tensor, capacity: int) -> Tensor:
    """``(T, A)`` bool: true for each expert's ``capacity`` largest weights; of equal ones the first come first."""
    weights, experts = weights_TA.flatten().tolist(), expert_ids_TA.flatten().tolist()
    kept = [False] * len(weights)
    for expert in set(experts):
        choices = [choice for choice, chosen in enumerate(experts) if chosen == expert]
        for choice in sorted(choices, key=lambda choice: (-weights[choice], choice))[:capacity]:
            kept[choice] = True
    return torch.tensor(kept, device=weights_TA.device).view_as(expert_ids_TA)


def within_capacity(weights_TA: Tensor, expert_ids_TA: Tensor, capacity: int) -> Tensor:
    """``within_capacity_reference`` by sorting; nothing is copied to the host."""
    expert_N = expert_ids_TA.flatten()
    by_weight_N = weights_TA.detach().flatten().argsort(descending=True, stable=True)
    sorted_N, order_N = expert_N[by_weight_N].sort(stable=True)
    rank_N = torch.arange(len(expert_N), device=expert_N.device) - torch.searchsorted(sorted_N, sorted_N)
    kept_N = torch.empty_like(expert_N, dtype=torch.bool)
    kept_N[by_weight_N[order_N]] = rank_N < capacity
    return kept_N.view_as(expert_ids_TA)
