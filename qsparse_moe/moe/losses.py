"""The two losses that keep a router healthy. B sequences, S tokens each, E experts, A experts a token."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance_loss(probs_BSE: Tensor, expert_ids_BSA: Tensor) -> Tensor:
    """``E * sum_e f_e P_e``, averaged over B: 1 when the load is even and at most E (arXiv 2101.03961, eq. 4).

    f_e is the share of the routed rows that went to expert e, P_e the mean probability it was given, both over the S
    tokens of one entry of B. Fold B into S to balance over a whole micro-batch instead of over each sequence.
    """
    num_sequences, _, num_experts = probs_BSE.shape
    flat_ids = expert_ids_BSA.flatten(1)
    rows_BE = torch.zeros(num_sequences, num_experts, dtype=probs_BSE.dtype, device=probs_BSE.device)
    rows_BE.scatter_add_(1, flat_ids, torch.ones_like(flat_ids, dtype=probs_BSE.dtype))
    share_BE = rows_BE / flat_ids.shape[1]
    return num_experts * (share_BE * probs_BSE.mean(1)).sum(-1).mean()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, which keeps the logits small (arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(-1).square().mean()
