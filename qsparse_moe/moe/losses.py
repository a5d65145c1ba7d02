"""The two losses that keep a router healthy, and the loads that the first is formed from.

T tokens, E experts, A experts a token; G groups of tokens whose balance is looked at by itself, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Balance(NamedTuple):
    """What a layer's balance loss is formed from, outside of it."""

    rows_GE: Tensor
    """float64, without gradient: the rows that the router gave to every expert."""
    probs_GE: Tensor
    """At least fp32: the mean probability that it gave to every expert."""


def balance_of(probs_TE: Tensor, expert_ids_TA: Tensor, num_groups: int) -> Balance:
    """Rows and mean probabilities of each of ``num_groups`` equal parts of the tokens."""
    ids_GN = expert_ids_TA.unflatten(0, (num_groups, -1)).flatten(1)
    rows_GE = torch.zeros(num_groups, probs_TE.shape[-1], dtype=torch.float64, device=probs_TE.device)
    rows_GE.scatter_add_(1, ids_GN, torch.ones_like(ids_GN, dtype=torch.float64))
    return Balance(rows_GE, probs_TE.unflatten(0, (num_groups, -1)).mean(1))


def load_balance_loss(balance: Balance) -> Tensor:
    """``E * sum_e f_e P_e``: 1 at even load and E where one expert has everything (arXiv 2101.03961, eq. 4).

    f_e is the share of the rows that went to expert e, P_e the mean probability that it was given. Leading dims, such
    as layers and groups, are averaged.
    """
    rows_GE, probs_GE = balance
    share_GE = (rows_GE / rows_GE.sum(-1, keepdim=True)).to(probs_GE.dtype)
    return probs_GE.shape[-1] * (share_GE * probs_GE).sum(-1).mean()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, which keeps the logits small (arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(-1).square().mean()


class StepLoad:
    """Every layer's rows over the ranks and over the micro-batches of one step so far (arXiv 2501.11873).

    It is given to a model by what trains it, which knows the ranks and when a step ends.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """``reduce`` adds a tensor over the ranks; all of them call it together."""
        self._reduce = reduce
        self._rows: Tensor | None = None

    def add(self, rows: Tensor) -> Tensor:
        """Count the rows of one more micro-batch, of any shape, with one reduction; the rows of the step so far."""
        rows = self._reduce(rows.clone())
        self._rows = rows if self._rows is None else self._rows + rows
        return self._rows

    def reset(self) -> None:
        """Begin a new step."""
        self._rows = None
