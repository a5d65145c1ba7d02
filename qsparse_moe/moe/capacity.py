"""Which routed rows an expert has no room for. T tokens, A experts a token, N = T * A choices, E experts.

Of those that choose an expert it takes the largest router weights: the policy ``probs``, the default of Megatron-Core
and of DeepSpeed. The other usual one takes the first in the batch, and so drops the ends of the last rows.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.moe.dispatch import Permutation, RoutedRows


class KeptRows(NamedTuple):
    """The rows that stay of a plan that knows of no drops, in its order."""

    token_N: Tensor
    """The token of each row."""
    expert_N: Tensor
    """The expert of each row, ascending."""
    rows_per_expert_E: Tensor
    """An expert without rows has 0."""
    row_N: Tensor
    """Which row of the plan each is."""
    plan: RoutedRows


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


def dropping(permutation: Permutation) -> Permutation:
    """``permutation``, whose plan knows of no drops, with them.

    A dropped row is left out behind ``permute`` and stands as zeros before ``combine``: it adds nothing to its token,
    and no gradient passes through it, to the token or to its router weight.
    """

    def plan(expert_ids_TA: Tensor, num_experts: int, kept_TA: Tensor | None) -> RoutedRows:
        rows = permutation.plan(expert_ids_TA, num_experts, None)
        return rows if kept_TA is None else keep_rows(rows, expert_ids_TA, num_experts, kept_TA)

    def permute(x_TD: Tensor, rows: RoutedRows) -> Tensor:
        if not isinstance(rows, KeptRows):
            return permutation.permute(x_TD, rows)
        return permutation.permute(x_TD, rows.plan).index_select(0, rows.row_N)

    def combine(y_ND: Tensor, weights_TA: Tensor, rows: RoutedRows) -> Tensor:
        if not isinstance(rows, KeptRows):
            return permutation.combine(y_ND, weights_TA, rows)
        all_rows = y_ND.new_zeros(weights_TA.numel(), y_ND.shape[1])
        return permutation.combine(all_rows.index_copy(0, rows.row_N, y_ND), weights_TA, rows.plan)

    return Permutation(plan, permute, combine)


def keep_rows(plan: RoutedRows, expert_ids_TA: Tensor, num_experts: int, kept_TA: Tensor) -> KeptRows:
    """``plan`` without the choices of which ``kept_TA`` is false; their number is copied to the host."""
    kept_TE = torch.zeros(len(kept_TA), num_experts, dtype=torch.bool, device=kept_TA.device)
    kept_TE.scatter_(1, expert_ids_TA, kept_TA)
    (row_N,) = kept_TE[plan.token_N.long(), plan.expert_N.long()].nonzero(as_tuple=True)
    return KeptRows(plan.token_N[row_N], plan.expert_N[row_N], kept_TE.sum(0), row_N, plan)
