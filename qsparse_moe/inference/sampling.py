"""Choose the next token from logits, with pure functions. B sequences, V vocabulary.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. An id whose logit is -inf is
never chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.errors import ArgumentError, TrainingDiverged


@dataclass(frozen=True)
class Sampling:
    """The method that chooses the next token; the default is greedy.

    Raises:
        ConfigError: a value lies outside of its range, or would have no effect because the temperature is 0.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens whose probabilities sum to at least this (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Draw from the tokens with at least this fraction of the largest probability (arXiv 2407.01082); 0: from all."""
    repetition_penalty: float = 1.0
    """Positive logits of ids that occur in the sequence are divided by it, negative ones multiplied (arXiv 1909.05858);
    1: none."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"{{temperature}} ({self.temperature}) must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            problems.append(f"{{top_k}} ({self.top_k}) must be at least 0; 0 draws from all tokens")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"{{top_p}} ({self.top_p}) must lie in (0, 1]; 1 draws from all tokens")
        if not 0.0 <= self.min_p <= 1.0:
            problems.append(f"{{min_p}} ({self.min_p}) must lie in [0, 1]; 0 draws from all tokens")
        if not 0.0 < self.repetition_penalty < float("inf"):
            problems.append(f"{{repetition_penalty}} ({self.repetition_penalty}) must be positive; 1 is no penalty")
        # Refused, not ignored: a user who sets top_k expects draws.
        idle = [
            f"{{{name}}}" for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(self, name) != off
        ]
        if self.temperature == 0 and idle:
            problems.append(
                f"{' and '.join(idle)} must be left out at {{temperature}} 0, which takes the likeliest token; set a "
                "{temperature} above 0 to draw"
            )
        if problems:
            raise ArgumentError("; ".join(problems))


class Sampler:
    """Chooses the next token of every sequence; each sequence has random numbers from its own seed."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """``tokens`` are those of each sequence so far, for the repetition penalty."""
        self.sampling = sampling
        # On the CPU, so that a seed gives the same numbers for a model on any device.
        self._generators = [torch.Generator().manual_seed(_checked_seed(seed)) for seed in seeds]
        self._tokens = [list(sequence) for sequence in tokens]

    def __call__(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next tokens ``(B,)`` and their log-probabilities ``(B,)`` in the model's own distribution.

        Both lie on the CPU. The log-probability is that before penalty, temperature and cuts.

        Raises:
            TrainingDiverged: a logit is NaN or infinite; -inf marks an id without probability.
        """
        penalised_BV = logits_BV
        if self.sampling.repetition_penalty != 1.0:
            penalised_BV = penalise_repetition(logits_BV, self._tokens, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            chosen_B = penalised_BV.argmax(-1)
        else:
            probs_BV = probabilities(penalised_BV, self.sampling)
            # One number per sequence and step, so that a text does not depend on the other sequences of its batch.
            uniform_B = torch.cat([torch.rand(1, generator=one, dtype=torch.float64) for one in self._generators])
            # Not torch.multinomial, which draws all rows from one generator.
            chosen_B = draw(probs_BV, uniform_B.to(probs_BV.device))
        # From the unchanged logits, so that texts with different settings can be compared by them.
        log_probs_B = logits_BV.log_softmax(-1).gather(-1, chosen_B[:, None])[:, 0].cpu()
        if log_probs_B.isnan().any():
            raise TrainingDiverged(
                "generation: the logits of the model are not finite, because its weights or an activation are not; use "
                "an earlier checkpoint, or weights in fp32 if they are in another number format"
            )
        chosen_B = chosen_B.cpu()
        for sequence, token in zip(self._tokens, chosen_B.tolist(), strict=True):
            sequence.append(token)
        return chosen_B, log_probs_B

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences but these, given by their place in the batch."""
        self._generators = [self._generators[place] for place in sequences]
        self._tokens = [self._tokens[place] for place in sequences]


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the distribution ``(B, V)`` that tokens are drawn from, in float64; the temperature is above 0."""
    # float64, because the cumulative sums over a large vocabulary decide which token is drawn.
    logits_BV = cut_top_k(logits_BV / sampling.temperature, sampling.top_k)
    probs_BV = logits_BV.softmax(-1, dtype=torch.float64)
    return cut_min_p(cut_top_p(probs_BV, sampling.top_p), sampling.min_p)


def penalise_repetition(logits_BV: Tensor, tokens: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Return the logits with those of the ids that occur in ``tokens`` made less likely; see ``Sampling``."""
    # Once per id, however often it occurs, as in transformers.
    occurs_BV = torch.zeros(logits_BV.shape, dtype=torch.bool)
    for row_V, sequence in zip(occurs_BV, tokens, strict=True):
        row_V[torch.as_tensor(sequence, dtype=torch.int64)] = True
    # A negative logit would become more likely by a division.
    less_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(occurs_BV.to(logits_BV.device), less_BV, logits_BV)


def cut_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """Return the logits with all but the ``top_k`` largest of each row at -inf; equal ones go to the lower id."""
    if top_k == 0 or top_k >= logits_BV.shape[-1]:
        return logits_BV
    # A stable sort, because torch.topk does not promise which of equal logits it takes.
    order_BK = logits_BV.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    likely_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter_(-1, order_BK, True)
    return logits_BV.masked_fill(~likely_BV, -torch.inf)


def cut_top_p(probs_BV: Tensor, top_p: float) -> Tensor:
    """Return the distribution cut to the smallest set of likeliest tokens whose probabilities sum to ``top_p``.

    The likeliest token always stays; equal ones go to the lower id.
    """
    if top_p == 1.0:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    # Without the token itself: the one that crosses the sum still belongs to the set.
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    likely_BV = torch.zeros_like(probs_BV, dtype=torch.bool).scatter_(-1, order_BV, before_BV < top_p)
    return _normalised(probs_BV * likely_BV)


def cut_min_p(probs_BV: Tensor, min_p: float) -> Tensor:
    """Return the distribution cut to the tokens with at least ``min_p`` times the largest probability."""
    if min_p == 0.0:
        return probs_BV
    return _normalised(probs_BV * (probs_BV >= min_p * probs_BV.amax(-1, keepdim=True)))


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return ``(B,)``: the id at which the sum of the probabilities up to it first exceeds ``uniform`` in [0, 1).

    An id of probability 0 is never drawn. Where the probabilities are NaN the result is some id.
    """
    sums_BV = probs_BV.double().cumsum(-1)
    total_B1 = sums_BV[:, -1:]
    # The product may round up to the total, which no sum exceeds.
    wanted_B1 = torch.minimum(uniform_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # From the right, so that an id whose probability is 0 and whose sum equals that of the id before it is passed over.
    # With sums of NaN the place may lie behind the last id; the clamp keeps the lookup of its log-probability, which
    # reports them, within range.
    return torch.searchsorted(sums_BV, wanted_B1, right=True)[:, 0].clamp(max=probs_BV.shape[-1] - 1)


def _normalised(probs_BV: Tensor) -> Tensor:
    return probs_BV / probs_BV.sum(-1, keepdim=True)


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise ArgumentError(
            f"{{seed}} ({seed}) must lie from 0 to 2^63 - 1, that of the last prompt too; choose a smaller one"
        )
    return seed
