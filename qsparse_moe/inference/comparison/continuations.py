"""Greedy continuations of the same prompts by two models: where they part, and how the reference judges the model's.

P prompts, G new tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.scoring import Score, ScoredTokens, score
from qsparse_moe.inference.sequences import Generation
from qsparse_moe.training.evaluate import Forward

_NUM_BINS = 8


@dataclass(frozen=True)
class Bin:
    """Means over the tokens at some consecutive positions of all continuations."""

    begin: int
    """First position, counted from 0 at the first new token."""
    end: int
    """Position after the last one."""
    num_tokens: int
    agreement: float
    """Fraction of the model's tokens that the reference would choose after the same tokens."""
    log_probability: float
    """Mean log-probability of the model's tokens under the reference, in nats."""
    own_log_probability: float
    """Mean log-probability of the same tokens under the model itself, in nats."""


@dataclass(frozen=True)
class ContinuationChange:
    """Comparison of greedy continuations."""

    num_prompts: int
    new_tokens: int
    """Largest number of new tokens per prompt; a document may end earlier."""
    agreement_by_position: tuple[float | None, ...]
    """Fraction of the prompts with the same token at this position, of those for which both have one; None if there are
    none."""
    agreement: float
    """The same over all positions."""
    first_differences: tuple[int | None, ...]
    """Per prompt, the first position at which the continuations differ; None if they never do."""
    drift: tuple[Bin, ...]
    drift_agreement: float
    """``Bin.agreement`` over all positions."""
    drift_log_probability: float
    """``Bin.log_probability`` over all positions."""
    reference_log_probability: float
    """Mean log-probability of the reference's tokens under the reference itself, in nats, with which
    ``drift_log_probability`` is compared."""

    @property
    def median_first_difference(self) -> float | None:
        """Median over the prompts; None if at least half of them never differ."""
        median = statistics.median(math.inf if one is None else one for one in self.first_differences)
        return median if math.isfinite(median) else None

    @property
    def never_parts(self) -> float:
        """Fraction of the prompts whose continuations are the same to the end."""
        return sum(one is None for one in self.first_differences) / self.num_prompts

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            **vars(self),
            "drift": [dict(vars(one)) for one in self.drift],
            "median_first_difference": self.median_first_difference,
            "never_parts": self.never_parts,
        }


def continued(
    generator: Generator, prompts: Sequence[Sequence[int]], *, new_tokens: int, batch_size: int
) -> list[Generation]:
    """Return the greedy continuation of each prompt, of at most ``new_tokens`` tokens."""
    found: list[Generation] = []
    for begin in range(0, len(prompts), batch_size):
        found += generator.generate(prompts[begin : begin + batch_size], max_tokens=new_tokens)
    return found


def compare_continuations(
    reference: Sequence[Generation], own: Sequence[Generation], scores: Sequence[Score], *, new_tokens: int, end: int
) -> ContinuationChange:
    """Return the figures of the continuations of the same prompts.

    Args:
        reference: continuations by the reference.
        own: continuations by the model.
        scores: scores of the tokens of ``own`` under the reference, from ``judged``.
        new_tokens: largest number of new tokens.
        end: the document token, at which a continuation ends. It counts as its last token.
    """
    pairs = [(_tokens(one, end), _tokens(other, end)) for one, other in zip(reference, own, strict=True)]
    agreeing, both = [0] * new_tokens, [0] * new_tokens
    for one, other in pairs:
        for position, (a, b) in enumerate(zip(one, other, strict=False)):
            both[position] += 1
            agreeing[position] += a == b
    bins = _bins(own, scores, new_tokens)
    return ContinuationChange(
        num_prompts=len(pairs),
        new_tokens=new_tokens,
        agreement_by_position=tuple(a / b if b else None for a, b in zip(agreeing, both, strict=True)),
        agreement=sum(agreeing) / sum(both),
        first_differences=tuple(_first_difference(*pair) for pair in pairs),
        drift=bins,
        drift_agreement=_mean(bins, "agreement"),
        drift_log_probability=_mean(bins, "log_probability"),
        reference_log_probability=_mean_of([value for one in reference for value in one.log_probabilities]),
    )


def judged(
    forward: Forward, prompts: Sequence[Sequence[int]], own: Sequence[Generation], *, batch_size: int
) -> list[Score]:
    """Return the scores of generated tokens after their prompts, under the model of ``forward``."""
    # A document may end at once, and then there is nothing to judge.
    requests = [
        ScoredTokens(tuple([*prompt, *one.token_ids][:-1]), one.token_ids)
        for prompt, one in zip(prompts, own, strict=True)
        if one.token_ids
    ]
    found = iter(score(forward, requests, batch_size=batch_size))
    return [next(found) if one.token_ids else Score((), ()) for one in own]


def _tokens(one: Generation, end: int) -> tuple[int, ...]:
    return (*one.token_ids, end) if one.stop_reason == "stop_token" else one.token_ids


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    # Only an end of the document makes one of them shorter, and that token differs from what the other has there.
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def _bins(own: Sequence[Generation], scores: Sequence[Score], new_tokens: int) -> tuple[Bin, ...]:
    num = min(_NUM_BINS, new_tokens)
    edges = [round(index * new_tokens / num) for index in range(num + 1)]
    bins = []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        greedy = [value for one in scores for value in one.are_greedy[begin:end]]
        if greedy:
            bins.append(
                Bin(
                    begin,
                    end,
                    len(greedy),
                    agreement=sum(greedy) / len(greedy),
                    log_probability=_mean_of([v for one in scores for v in one.log_probabilities[begin:end]]),
                    own_log_probability=_mean_of([v for one in own for v in one.log_probabilities[begin:end]]),
                )
            )
    return tuple(bins)


def _mean(bins: Sequence[Bin], name: str) -> float:
    num = sum(one.num_tokens for one in bins)
    return sum(getattr(one, name) * one.num_tokens for one in bins) / num if num else math.nan


def _mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
