"""Sums over the tokens of all batches, and the figures that they become. Adding batches in any order is exact.

T tokens that count, A experts per token, E experts, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RoutingChange:
    """Routing choices that the model makes otherwise than the reference, in one layer."""

    choices_changed: float
    """Fraction of the reference's choices (A per token) that the model does not make."""
    tokens_changed: float
    """Fraction of the tokens whose set of A experts differs."""
    first_changed: float
    """Fraction of the tokens whose first expert differs."""
    reference_choices_E: tuple[int, ...]
    """Number of tokens that choose each expert in the reference."""
    lost_E: tuple[int, ...]
    """Number of them that do not choose it in the model."""
    gained_E: tuple[int, ...]
    """Number of tokens that choose each expert in the model only."""


class RoutingSums:
    """Counts of the choices of one layer."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._tokens = self._choices = self._tokens_changed = self._first_changed = 0
        self._reference_E = torch.zeros(num_experts, dtype=torch.int64)
        self._lost_E, self._gained_E = self._reference_E.clone(), self._reference_E.clone()

    def add(self, reference_TA: Tensor, own_TA: Tensor) -> None:
        """Add the experts of the same tokens in the reference and in the model, the first choice first."""
        reference_TE, own_TE = self._chosen(reference_TA), self._chosen(own_TA)
        lost_TE = reference_TE & ~own_TE
        self._tokens += len(reference_TA)
        self._choices += reference_TA.numel()
        self._tokens_changed += int((reference_TE != own_TE).any(-1).sum())
        self._first_changed += int((reference_TA[:, 0] != own_TA[:, 0]).sum())
        self._reference_E += reference_TE.sum(0).cpu()
        self._lost_E += lost_TE.sum(0).cpu()
        self._gained_E += (own_TE & ~reference_TE).sum(0).cpu()

    def change(self) -> RoutingChange:
        """Return the figures of all tokens so far."""
        return RoutingChange(
            choices_changed=int(self._lost_E.sum()) / self._choices,
            tokens_changed=self._tokens_changed / self._tokens,
            first_changed=self._first_changed / self._tokens,
            reference_choices_E=tuple(self._reference_E.tolist()),
            lost_E=tuple(self._lost_E.tolist()),
            gained_E=tuple(self._gained_E.tolist()),
        )

    def _chosen(self, experts_TA: Tensor) -> Tensor:
        chosen_TE = torch.zeros(len(experts_TA), self._num_experts, dtype=torch.bool, device=experts_TA.device)
        return chosen_TE.scatter_(-1, experts_TA, True)


@dataclass(frozen=True)
class HiddenChange:
    """Difference of the hidden states after one layer, mean over the tokens."""

    error: float
    """Norm of the difference over the norm in the reference."""
    cosine: float


class HiddenSums:
    """Sums over the hidden states after one layer."""

    def __init__(self) -> None:
        self._tokens = 0
        self._error = self._cosine = 0.0

    def add(self, reference_TD: Tensor, own_TD: Tensor) -> None:
        """Add the hidden states of the same tokens in the reference and in the model."""
        # In float64, so that equal vectors have the cosine 1 to many digits.
        reference_TD, own_TD = reference_TD.double(), own_TD.double()
        norm_T = reference_TD.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        self._tokens += len(reference_TD)
        self._error += float(((own_TD - reference_TD).norm(dim=-1) / norm_T).sum())
        self._cosine += float(F.cosine_similarity(reference_TD, own_TD, dim=-1, eps=1e-300).sum())

    def change(self) -> HiddenChange:
        """Return the means over all tokens so far."""
        return HiddenChange(self._error / self._tokens, self._cosine / self._tokens)


@dataclass(frozen=True)
class OutputChange:
    """Difference of the distributions of the next token, mean over the tokens."""

    num_tokens: int
    kl_divergence: float
    """KL divergence, the sum of p log(p / q) with p of the reference and q of the model, in nats."""
    top1_agreement: float
    """Fraction of the tokens after which both have the same likeliest token."""
    reference_loss: float
    """Cross-entropy of the true next token under the reference, in nats."""
    loss: float
    """Cross-entropy of the true next token under the model, in nats."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dict(vars(self))


class OutputSums:
    """Sums over the next-token distributions."""

    def __init__(self) -> None:
        self._tokens = self._agreeing = 0
        self._kl = self._reference_loss = self._loss = 0.0

    def add(self, reference_TV: Tensor, own_TV: Tensor, targets_T: Tensor) -> None:
        """Add the logits after the same tokens in the reference and in the model, and the true next tokens."""
        # In at least fp32: the softmax sums over the whole vocabulary.
        wide = torch.promote_types(reference_TV.dtype, torch.float32)
        reference_TV, own_TV = reference_TV.to(wide).log_softmax(-1), own_TV.to(wide).log_softmax(-1)
        probs_TV = reference_TV.exp()
        # Ids that a model hides have -inf on both sides, and a probability of 0 adds nothing.
        terms_TV = torch.where(probs_TV > 0, probs_TV * (reference_TV - own_TV), 0.0)
        self._tokens += len(targets_T)
        self._agreeing += int((reference_TV.argmax(-1) == own_TV.argmax(-1)).sum())
        self._kl += float(terms_TV.sum(-1).double().sum())
        self._reference_loss += float(F.nll_loss(reference_TV, targets_T, reduction="sum").double())
        self._loss += float(F.nll_loss(own_TV, targets_T, reduction="sum").double())

    def change(self) -> OutputChange:
        """Return the means over all tokens so far."""
        num = self._tokens
        return OutputChange(
            num_tokens=num,
            kl_divergence=self._kl / num,
            top1_agreement=self._agreeing / num,
            reference_loss=self._reference_loss / num,
            loss=self._loss / num,
        )
