"""Inputs that make any linear router produce a given expert load. T tokens, D width, E experts, A choices."""

from __future__ import annotations

import torch
from torch import Tensor

LOADS = ("balanced", "skewed")
_CHOSEN, _STEP, _NOISE = 6.0, 1.0, 0.3
"""Logit of the first choice, range of the chosen logits, and standard deviation of the others.

They are so far apart that bf16 keeps their order.
"""


def choose_experts(load: str, num_tokens: int, num_experts: int, experts_per_token: int) -> Tensor:
    """Return A different experts per token, ``(T, A)``, first choice first; equal arguments give equal results.

    ``balanced`` gives all experts the same number of rows up to one. ``skewed`` draws the experts of a token without
    replacement, expert e with a probability proportional to 1 / (e + 1).
    """
    generator = torch.Generator().manual_seed(0)
    if load == "balanced":
        slots = torch.arange(num_tokens * experts_per_token).view(num_tokens, experts_per_token)
        return (slots % num_experts)[torch.randperm(num_tokens, generator=generator)]
    assert load == "skewed", load
    weights_TE = (1 / torch.arange(1, num_experts + 1)).expand(num_tokens, -1)
    return torch.multinomial(weights_TE, experts_per_token, generator=generator)


def routed_input(expert_ids_TA: Tensor, num_experts: int, hidden_size: int) -> Tensor:
    """Return normal values, ``(T, D)`` fp32, whose first E features are the logits that select ``expert_ids_TA``.

    With ``router_weight``, a router reads only these features. Every contender with a linear router then routes the
    same tokens to the same experts, without an interface for forced routing.
    """
    generator = torch.Generator().manual_seed(1)
    num_tokens, experts_per_token = expert_ids_TA.shape
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator)
    chosen_A = _CHOSEN - _STEP * torch.arange(experts_per_token) / experts_per_token
    logits_TE = _NOISE * torch.randn(num_tokens, num_experts, generator=generator)
    # The chosen logits are far above the noise, so that every top-A selection finds them.
    logits_TE.scatter_(1, expert_ids_TA, chosen_A.expand(num_tokens, -1))
    x_TD[:, :num_experts] = logits_TE
    return x_TD


def router_weight(num_experts: int, hidden_size: int) -> Tensor:
    """Return the router weight, ``(E, D)``, under which the logit of expert e is feature e."""
    return torch.eye(num_experts, hidden_size)
