"""The language-modelling loss: labels, targets, ignored positions and borders of documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qsparse_moe.model.transformer import cross_entropy, shifted_labels
from tests.model.small_model import VOCAB, make, tokens


def test_ignored_labels_do_not_count_and_all_ignored_is_zero():
    logits, labels = torch.randn(2, 3, VOCAB), torch.randint(0, VOCAB, (2, 3))
    labels[0, 1] = -100
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(cross_entropy(logits, labels), want)
    assert cross_entropy(logits, torch.full((2, 3), -100)) == 0
    one = torch.full((2, 3), -100)
    one[1, 2] = 5
    torch.testing.assert_close(cross_entropy(logits, one), -logits[1, 2].log_softmax(-1)[5])


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_the_loss_is_in_at_least_fp32(dtype, wide):
    logits, labels = torch.randn(2, 3, VOCAB).to(dtype), torch.randint(0, VOCAB, (2, 3))
    found = cross_entropy(logits, labels)
    assert found.dtype == wide
    want = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=0)


def test_labels_are_the_tokens_themselves_and_position_s_predicts_the_label_after_it():
    model = make(moe={"num_dense_layers": 3})
    ids = tokens()
    out = model(ids, ids)
    log_probs = out.logits_BSV.log_softmax(-1)
    want = [-log_probs[row, s, ids[row, s + 1]] for row in range(2) for s in range(11)]
    torch.testing.assert_close(out.loss, torch.stack(want).mean())
    shifted = torch.full_like(ids, -100)
    shifted[:, :-1] = ids[:, 1:]
    assert torch.equal(out.loss, model(ids, targets_BS=shifted).loss)
    # An ignored label takes away what the position before it predicts.
    labels = ids.clone()
    labels[0, 3] = -100
    del want[2]
    torch.testing.assert_close(model(ids, labels).loss, torch.stack(want).mean())


def test_the_last_label_of_a_document_is_not_predicted_from_another_one():
    ids, documents = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 2]])
    assert shifted_labels(ids, documents).tolist() == [[6, -100, 8, -100, -100]]
    numbered_down = torch.tensor([[3, 3, 1, 1, 2]])
    assert shifted_labels(ids, numbered_down).tolist() == [[6, -100, 8, -100, -100]]
    assert shifted_labels(ids).tolist() == [[6, 7, 8, 9, -100]] and ids.tolist() == [[5, 6, 7, 8, 9]]
    model = make()
    out = model(ids, ids, documents_BS=documents)
    want = F.cross_entropy(out.logits_BSV[0, [0, 2]], torch.tensor([6, 8]))
    torch.testing.assert_close(out.losses["lm_loss"], want.detach())


def test_labels_and_targets_together_are_refused():
    ids = tokens()
    with pytest.raises(ValueError, match="labels_BS and targets_BS are both given.*must be None.*leave one"):
        make()(ids, ids, targets_BS=ids)


def test_the_loss_of_labels_is_that_of_transformers():
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    ids = tokens()
    labels = ids.clone()
    labels[1, 4:7] = -100
    out = make()(ids, labels)
    want = loss_utils.ForCausalLMLoss(out.logits_BSV, labels, VOCAB)
    torch.testing.assert_close(out.losses["lm_loss"], want.detach())
