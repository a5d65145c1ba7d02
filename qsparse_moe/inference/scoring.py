"""Log-probabilities of given tokens after a context, in batches of similar length.

B sequences, S tokens of the longest input, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.training.evaluate import Forward


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens of one request: those that the model reads, and those at the end that it is asked about."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    """The token that follows each of the last ``len(targets)`` inputs."""


@dataclass(frozen=True)
class Score:
    """The result for one ``ScoredTokens``, with one entry per target."""

    log_probabilities: tuple[float, ...]
    """Natural logarithm of the probability of each target after all tokens before it."""
    are_greedy: tuple[bool, ...]
    """Whether each target is the likeliest token there, which greedy generation would choose."""

    @property
    def log_probability(self) -> float:
        """Sum over the targets."""
        return sum(self.log_probabilities)


def score(
    forward: Forward,
    requests: Sequence[ScoredTokens],
    *,
    batch_size: int,
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> list[Score]:
    """Return the score of every request, in their order.

    Args:
        forward: returns the logits of a batch; see ``training.evaluate.Forward``.
        requests: each has at least one target and as many inputs.
        batch_size: number of sequences per forward pass.
        notify: called with the number of finished requests and of all.
    """
    # The longest first: sequences of similar length waste little padding, and too little memory shows at once.
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].inputs))
    found: dict[int, Score] = {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        found.update(zip(chosen, _batch_scores(forward, [requests[index] for index in chosen]), strict=True))
        notify(len(found), len(requests))
    return [found[index] for index in range(len(requests))]


@torch.no_grad()
def _batch_scores(forward: Forward, requests: Sequence[ScoredTokens]) -> list[Score]:
    logits_BSV = forward(_padded(requests)).logits_BSV
    return [_score(logits_SV, request) for logits_SV, request in zip(logits_BSV, requests, strict=True)]


def _padded(requests: Sequence[ScoredTokens]) -> Batch:
    longest = max(len(request.inputs) for request in requests)
    # Any id will do as padding: it comes after the tokens of its sequence, which attend backwards only.
    tokens_BS = torch.zeros(len(requests), longest, dtype=torch.int64)
    targets_BS = torch.full_like(tokens_BS, IGNORED_LABEL)
    for row, request in enumerate(requests):
        end = len(request.inputs)
        tokens_BS[row, :end] = torch.tensor(request.inputs)
        targets_BS[row, end - len(request.targets) : end] = torch.tensor(request.targets)
    positions_BS = torch.arange(longest).expand_as(tokens_BS)
    # A request is one document from its beginning, so no mask is needed.
    return Batch(tokens_BS, targets_BS, positions_BS, None)


def _score(logits_SV: Tensor, request: ScoredTokens) -> Score:
    end = len(request.inputs)
    # Only the scored positions, in fp32: the softmax sums over the whole vocabulary.
    scored_TV = logits_SV[end - len(request.targets) : end].float()
    targets_T = torch.tensor(request.targets, device=scored_TV.device)
    log_probs_T = scored_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    return Score(tuple(log_probs_T.tolist()), tuple((scored_TV.argmax(-1) == targets_T).tolist()))
