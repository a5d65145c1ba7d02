"""The two auxiliary losses of a router: load balance and z-loss.

T tokens, E experts, A experts per token, G groups of tokens that are balanced separately, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class BalanceTerms(NamedTuple):
    """The two terms of a layer's load balance loss, which the model computes from the terms of all layers."""

    routed_GE: Tensor
    """Number of routed tokens per expert: float64, without gradient."""
    probs_GE: Tensor
    """Mean router probability per expert, at least fp32."""


def balance_terms(
    probs_TE: Tensor,
    expert_ids_TA: Tensor,
    num_groups: int,
    counted_T: Tensor | None = None,
    used_TA: Tensor | None = None,
) -> BalanceTerms:
    """Return the two terms for each of ``num_groups`` equal, contiguous parts of the tokens.

    With ``counted_T`` only the tokens count for which it is true, and groups without such a token are left out. With
    ``used_TA`` only those experts of a token count for which it is true.
    """
    ids_GN = expert_ids_TA.unflatten(0, (num_groups, -1)).flatten(1)
    # float64, so that counts stay exact when they are summed over ranks and micro-batches.
    if used_TA is None:
        ones_GN = torch.ones_like(ids_GN, dtype=torch.float64)
    else:
        ones_GN = used_TA.unflatten(0, (num_groups, -1)).flatten(1).double()
    routed_GE = torch.zeros(num_groups, probs_TE.shape[-1], dtype=torch.float64, device=probs_TE.device)
    probs_GXE = probs_TE.unflatten(0, (num_groups, -1))
    if counted_T is None:
        return BalanceTerms(routed_GE.scatter_add_(1, ids_GN, ones_GN), probs_GXE.mean(1))
    counted_GX = counted_T.unflatten(0, (num_groups, -1))
    counted_GN = counted_GX.repeat_interleave(expert_ids_TA.shape[1], dim=1)
    routed_GE.scatter_add_(1, ids_GN, ones_GN * counted_GN)
    number_G = counted_GX.sum(1)
    probs_GE = (probs_GXE * counted_GX[..., None]).sum(1) / number_G[:, None].clamp(min=1)
    # Without a token, the fractions of an empty group would be 0 / 0.
    return BalanceTerms(routed_GE[number_G > 0], probs_GE[number_G > 0])


def load_balance_loss(balance: BalanceTerms) -> Tensor:
    """Return ``E * sum_e f_e P_e``: 1 at even load, E if one expert gets every token (arXiv 2101.03961, eq. 4).

    f_e is the fraction of the routed tokens that went to expert e, and P_e its mean probability. The mean is taken over
    the leading dims, such as layers and groups. It is 0 for a layer whose tokens use no expert.
    """
    routed_GE, probs_GE = balance
    share_GE = (routed_GE / routed_GE.sum(-1, keepdim=True).clamp(min=1)).to(probs_GE.dtype)
    # Only the probabilities have a gradient: counts cannot be differentiated, and act as constant weights.
    return probs_GE.shape[-1] * (share_GE * probs_GE).sum(-1).mean()


def router_z_loss(logits_TE: Tensor, counted_T: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ``logsumexp(logits)^2``, which keeps logits small (arXiv 2202.08906, eq. 5).

    With ``counted_T`` the mean is over the tokens for which it is true.
    """
    squares_T = logits_TE.logsumexp(-1).square()
    if counted_T is None:
        return squares_T.mean()
    return (squares_T * counted_T).sum() / counted_T.sum().clamp(min=1)


class StepLoad:
    """Routed tokens per layer and expert, accumulated over the ranks and micro-batches of a step (arXiv 2501.11873).

    The training engine sets it on the model, because the engine knows the ranks and the end of a step.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Create an empty load; ``reduce`` sums a tensor over the ranks, all of which must call it."""
        self._reduce = reduce
        self._routed: Tensor | None = None

    def add(self, routed: Tensor) -> Tensor:
        """Add the counts of one more micro-batch, in one reduction, and return those of the step so far."""
        # A copy, because the reduction over ranks works in place.
        routed = self._reduce(routed.clone())
        # Every micro-batch is weighted with the counts so far, because those of later ones are not known yet.
        self._routed = routed if self._routed is None else self._routed + routed
        return self._routed

    def reset(self) -> None:
        """Start a new step."""
        self._routed = None
