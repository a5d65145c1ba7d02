"""Choices of routing: the ranks of choice that a MoE layer uses of every token, beside the cells of S.

Rank 0 is the first choice of a token. T tokens, A experts per token as the model routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import moe_layers
from qsparse_moe.moe.router import within_share
from qsparse_moe.sparsity.plan import SparsityPlan

# As in moe/router.py: added to a sum of weights that may underflow to 0.
_TINY = 1e-20

TOP_P = (0.5, 0.6, 0.7, 0.8, 0.9)
"""The shares of the router weight among which a plan chooses."""


class Choice(NamedTuple):
    """The ranks of choice that one layer uses."""

    experts: int
    """Experts per token: the ranks below it are used."""
    top_p: float = 1.0
    """Only the fewest first ranks whose router weights reach this share of the sum over all A."""
    skipped: int | None = None
    """A single rank that is left out; None in every plan, because only a sensitivity asks for it."""

    @property
    def name(self) -> str:
        """Return the label for tables, such as ``A 1``, ``A 2, top-p 0.7``, or ``without rank 0``."""
        if self.skipped is not None:
            return f"without rank {self.skipped}"
        return f"A {self.experts}" if self.top_p == 1.0 else f"A {self.experts}, top-p {self.top_p:g}"


class RoutingCell(NamedTuple):
    """The routing of one layer, and its change."""

    layer: int
    choice: Choice

    @property
    def name(self) -> str:
        """Return the label for tables."""
        return f"layer {self.layer}, {self.choice.name}"


def single_changes(current: Choice, experts_per_token: int) -> list[Choice]:
    """Return every smaller or larger number of experts, and each rank in use left out alone.

    Leaving out the last rank alone is the same as one expert less, and appears once.
    """
    counts = [Choice(experts) for experts in range(experts_per_token + 1)]
    alone = [current._replace(skipped=rank) for rank in range(current.experts - 1)]
    return [choice for choice in counts if choice != current] + alone


def used_ranks(weights_TA: Tensor, choice: Choice) -> Tensor:
    """Return ``(T, A)`` bool: whether each rank of each token is used."""
    rank_A = torch.arange(weights_TA.shape[-1], device=weights_TA.device)
    used_TA = (rank_A < choice.experts).expand_as(weights_TA)
    if choice.top_p < 1.0:
        used_TA = used_TA & within_share(weights_TA, choice.top_p)
    return used_TA if choice.skipped is None else used_TA & (rank_A != choice.skipped)


def choice_weights(weights_TA: Tensor, choice: Choice, *, renormalized: bool) -> Tensor:
    """Return ``(T, A)``: the router weights under ``choice``, 0 for the ranks that are not used.

    Args:
        weights_TA: the weights of all A ranks.
        choice: the ranks in use.
        renormalized: whether the weights in use are scaled to the sum of all A.
    """
    if choice.experts == 0:
        # Not by the division below, whose gradient would be nan in fp32.
        return torch.zeros_like(weights_TA)
    kept_TA = weights_TA * used_ranks(weights_TA, choice)
    if not renormalized:
        return kept_TA
    return kept_TA * (weights_TA.sum(-1, keepdim=True) / (kept_TA.sum(-1, keepdim=True) + _TINY))


def renormalizes(config: ModelConfig) -> bool:
    """Return whether the weights of fewer experts are scaled to the sum of all A."""
    router, mode = config.moe.router, config.moe.fewer_experts_weights
    return mode == "renormalized" or (
        mode == "router" and (router == "topk_softmax" or router.endswith("renormalized"))
    )


def choices_of(plan: SparsityPlan, config: ModelConfig) -> dict[int, Choice]:
    """Return the choice of every MoE layer under ``plan``."""
    most = config.moe.experts_per_token
    return {layer: Choice(plan.experts(layer, most), plan.top_p.get(layer, 1.0)) for layer in moe_layers(config)}


def with_choices(plan: SparsityPlan, choices: Mapping[int, Choice]) -> SparsityPlan:
    """Return ``plan`` with these choices in place of its own."""
    # A share of 1 needs no entry, and every engine runs a plan without top_p.
    top_p = {layer: choice.top_p for layer, choice in choices.items() if choice.top_p < 1.0}
    return replace(plan, experts_per_token={layer: choice.experts for layer, choice in choices.items()}, top_p=top_p)


def with_all_ranks(plan: SparsityPlan) -> SparsityPlan:
    """Return ``plan`` with every rank of choice in use."""
    return replace(plan, experts_per_token={}, top_p={})


def routing_choices(config: ModelConfig) -> list[Choice]:
    """Return the choices of ranks that a layer may have: every number of experts, and shares of the router weight."""
    most = config.moe.experts_per_token
    counts = [Choice(experts) for experts in range(most + 1)]
    return counts + [Choice(most, share) for share in TOP_P if most > 1]
