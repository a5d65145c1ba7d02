"""Log-probabilities of given tokens, with logits that are known: the batches, their targets, and every result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.data.batch import IGNORED_LABEL
from qsparse_moe.inference.scoring import Score, ScoredTokens, score

I = IGNORED_LABEL  # noqa: E741
REQUESTS = [
    ScoredTokens((1, 2, 3), (4,)),
    ScoredTokens((5,), (6,)),
    ScoredTokens((7, 8, 9, 10), (9, 10, 3)),
    ScoredTokens((2, 2), (1, 0)),
]


class Table:
    """Logits that depend on the last token alone, with a position added, so that none can be taken for another."""

    def __init__(self, dtype=torch.float32):
        drawn_VV = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))
        # The likeliest token after 3 and after 9 is the target of a request.
        drawn_VV[3, 4] = drawn_VV[9, 10] = 5.0
        self.logits_VV, self.batches = drawn_VV.to(dtype), []

    def __call__(self, batch):
        self.batches.append(batch)
        shifted_BSV = self.logits_VV[batch.tokens_BS].clone()
        shifted_BSV[..., 0] += batch.positions_BS.to(shifted_BSV.dtype)
        return SimpleNamespace(logits_BSV=shifted_BSV)

    def after(self, token, position):
        row_V = self.logits_VV[token].clone()
        row_V[0] += position
        return row_V.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_every_target_is_scored_after_the_tokens_before_it(dtype, batch_size):
    table = Table(dtype)
    found = score(table, REQUESTS, batch_size=batch_size)
    for one, request in zip(found, REQUESTS, strict=True):
        first = len(request.inputs) - len(request.targets)
        rows = [table.after(token, place) for place, token in enumerate(request.inputs)][first:]
        want = [float(row.log_softmax(-1)[token]) for row, token in zip(rows, request.targets, strict=True)]
        assert one.log_probabilities == pytest.approx(want, abs=1e-6)
        assert one.are_greedy == tuple(
            int(row.argmax()) == token for row, token in zip(rows, request.targets, strict=True)
        )
        assert one.log_probability == pytest.approx(sum(want), abs=1e-6)
    assert found[0].are_greedy == (True,) and found[2].are_greedy[1:2] == (True,)
    assert not all(found[2].are_greedy)


def test_batches_hold_the_longest_requests_first_with_their_targets_at_the_end():
    table, finished = Table(), []
    score(table, REQUESTS, batch_size=3, notify=lambda done, of: finished.append((done, of)))
    first, second = table.batches
    assert first.tokens_BS.tolist() == [[7, 8, 9, 10], [1, 2, 3, 0], [2, 2, 0, 0]]
    assert first.targets_BS.tolist() == [[I, 9, 10, 3], [I, I, 4, I], [1, 0, I, I]]
    assert first.positions_BS.tolist() == [[0, 1, 2, 3]] * 3
    assert (second.tokens_BS.tolist(), second.targets_BS.tolist()) == ([[5]], [[6]])
    assert first.documents_BS is None and finished == [(3, 4), (4, 4)]


def test_nothing_is_computed_without_requests():
    assert score(None, [], batch_size=2) == [] and Score((), ()).log_probability == 0
