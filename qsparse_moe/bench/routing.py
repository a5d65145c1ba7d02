"""Inputs that make any linear router send a given load to every expert. T tokens, D width, E experts, A choices."""

from __future__ import annotations

import torch
from torch import Tensor

LOADS = ("balanced", "skewed")
_CHOSEN, _STEP, _NOISE = 6.0, 1.0, 0.3
"""Logits of the first choice, the distance to the next, and the deviation of the others: bf16 tells them apart."""


def choose_experts(load: str, num_tokens: int, num_experts: int, experts_per_token: int) -> Tensor:
    """``(T, A)`` different experts a token, first choice first; the same for the same arguments.

    ``balanced`` gives all experts the same number of rows, or one more or less. ``skewed`` draws a token's experts
    one after the other without replacement, expert e with a probability in proportion to 1 / (e + 1).
    """
    generator = torch.Generator().manual_seed(0)
    if load == "balanced":
        slots = torch.arange(num_tokens * experts_per_token).view(num_tokens, experts_per_token)
        return (slots % num_experts)[torch.randperm(num_tokens, generator=generator)]
    assert load == "skewed", load
    weights_TE = (1 / torch.arange(1, num_experts + 1)).expand(num_tokens, -1)
    return torch.multinomial(weights_TE, experts_per_token, generator=generator)


def routed_input(expert_ids_TA: Tensor, num_experts: int, hidden_size: int) -> Tensor:
    """``(T, D)`` normal values whose first E features are the logits that choose ``expert_ids_TA``, fp32.

    With ``router_weight`` a router reads these features and nothing else, so that every contender that has a linear
    router routes the same rows to the same experts, and none needs a way to be forced.
    """
    generator = torch.Generator().manual_seed(1)
    num_tokens, experts_per_token = expert_ids_TA.shape
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator)
    chosen_A = _CHOSEN - _STEP * torch.arange(experts_per_token) / experts_per_token
    logits_TE = _NOISE * torch.randn(num_tokens, num_experts, generator=generator)
    logits_TE.scatter_(1, expert_ids_TA, chosen_A.expand(num_tokens, -1))
    x_TD[:, :num_experts] = logits_TE
    return x_TD


def router_weight(num_experts: int, hidden_size: int) -> Tensor:
    """``(E, D)``: expert e's logit is feature e."""
    return torch.eye(num_experts, hidden_size)
