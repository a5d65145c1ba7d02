"""The balance loss and the z-loss against sums that are written out, and loads over a step."""

import pytest
import torch

from qsparse_moe.moe.losses import BalanceTerms, StepLoad, balance_terms, load_balance_loss, router_z_loss

E, A, T = 6, 2, 15


def written_out_balance(probs, ids):
    """arXiv 2412.19437, eq. 17 to 20, for every sequence, averaged over them."""
    total = 0.0
    for sequence in range(len(probs)):
        num_tokens = len(probs[sequence])
        for expert in range(E):
            rows = sum(1 for token in range(num_tokens) if expert in ids[sequence, token].tolist())
            f = E / (A * num_tokens) * rows
            p = sum(probs[sequence, token, expert] for token in range(num_tokens)) / num_tokens
            total = total + f * p
    return total / len(probs)


def distinct_ids(num_tokens):
    return torch.stack([torch.randperm(E)[:A] for _ in range(num_tokens)])


@pytest.mark.parametrize("num_groups", [1, 3])
def test_balance_loss_and_its_gradient_match_the_written_out_sum(num_groups):
    probs = torch.randn(T, E, dtype=torch.float64).softmax(-1).requires_grad_()
    ids = distinct_ids(T)
    got = load_balance_loss(balance_terms(probs, ids, num_groups))
    want = written_out_balance(probs.unflatten(0, (num_groups, -1)), ids.unflatten(0, (num_groups, -1)))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, probs)[0] for loss in (got, want)))


def test_balance_loss_is_one_when_even_and_e_when_all_go_to_one():
    even_ids = torch.arange(E).view(E // A, A)
    assert load_balance_loss(balance_terms(torch.full((E // A, E), 1 / E), even_ids, 1)).item() == pytest.approx(1.0)
    certain = torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.long), E).float()
    one_id = torch.zeros(4, 1, dtype=torch.long)
    assert load_balance_loss(balance_terms(certain, one_id, 1)).item() == pytest.approx(E)


def test_leading_dims_are_averaged():
    balances = [balance_terms(torch.randn(T, E).softmax(-1), distinct_ids(T), 3) for _ in range(4)]
    stacked = BalanceTerms(*map(torch.stack, zip(*balances, strict=True)))
    torch.testing.assert_close(load_balance_loss(stacked), torch.stack([*map(load_balance_loss, balances)]).mean())


def test_z_loss_is_the_mean_squared_logsumexp():
    logits = torch.randn(T, E)
    torch.testing.assert_close(router_z_loss(logits), logits.exp().sum(-1).log().square().mean())


def test_the_load_of_a_step_adds_ranks_and_micro_batches_and_is_reset_after_the_step():
    calls = []

    def of_two_ranks(rows):
        calls.append(rows)
        return rows.add_(100)  # in place, as all-reduce is

    load = StepLoad(of_two_ranks)
    first, second = torch.tensor([[1.0, 2]]), torch.tensor([[5.0, 0]])
    assert load.add(first).tolist() == [[101, 102]]
    assert load.add(second).tolist() == [[206, 202]]
    assert first.tolist() == [[1, 2]], "what the layers returned stays as it is"
    load.reset()
    assert load.add(second).tolist() == [[105, 100]]
    assert len(calls) == 3, "one reduction a micro-batch"


# Three groups of two tokens, two experts per token of three; probabilities that differ everywhere.
PROBS = torch.tensor([[1, 3, 4], [6, 1, 1], [2, 2, 4], [8, 0, 0], [5, 2, 1], [0, 7, 1]], dtype=torch.float64) / 8
IDS = torch.tensor([[2, 1], [0, 2], [2, 0], [0, 1], [0, 1], [1, 2]])


def test_terms_by_hand_for_every_group():
    terms = balance_terms(PROBS, IDS, 3)
    assert terms.routed_GE.tolist() == [[1, 1, 2], [2, 1, 1], [1, 2, 1]]
    assert (terms.probs_GE * 16).tolist() == [[7, 4, 5], [10, 2, 4], [5, 9, 2]]
    whole = balance_terms(PROBS, IDS, 1)
    assert whole.routed_GE.tolist() == [[4, 4, 4]]
    torch.testing.assert_close(whole.probs_GE * 48, torch.tensor([[22.0, 15, 11]], dtype=torch.float64))


def test_only_counted_tokens_count_and_a_group_without_one_is_left_out():
    counted = torch.tensor([False, True, False, False, True, True])
    terms = balance_terms(PROBS, IDS, 3, counted)
    assert terms.routed_GE.tolist() == [[1, 0, 1], [1, 2, 1]]
    assert (terms.probs_GE * 16).tolist() == [[12, 2, 2], [5, 9, 2]]
    whole = balance_terms(PROBS, IDS, 1, counted)
    assert whole.routed_GE.tolist() == [[2, 2, 2]]
    torch.testing.assert_close(whole.probs_GE * 24, torch.tensor([[11.0, 10, 3]], dtype=torch.float64))


def test_all_tokens_counted_is_the_same_as_none_named():
    for groups in (1, 2, 3):
        named, plain = (
            balance_terms(PROBS, IDS, groups, torch.ones(6, dtype=torch.bool)),
            balance_terms(PROBS, IDS, groups),
        )
        assert torch.equal(named.routed_GE, plain.routed_GE)
        torch.testing.assert_close(named.probs_GE, plain.probs_GE)


def test_the_balance_loss_by_hand():
    terms = BalanceTerms(torch.tensor([[1.0, 1, 2], [0, 4, 0]]), torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    # 3 * (1/4 * 1/2 + 1/4 * 1/4 + 2/4 * 1/4) and 3 * 1/2.
    assert load_balance_loss(terms).item() == pytest.approx((3 * 5 / 16 + 3 / 2) / 2)


def test_the_z_loss_of_counted_tokens_is_their_mean_and_0_without_one():
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0], [100.0, -100.0]]) - torch.tensor(2.0).log()
    # The logsumexp of the first two is 0 and 3, that of the third 100 - log 2.
    assert router_z_loss(logits, torch.tensor([True, True, False])).item() == pytest.approx(4.5)
    assert router_z_loss(logits, torch.tensor([False, True, False])).item() == pytest.approx(9.0)
    assert router_z_loss(logits, torch.tensor([False, False, False])).item() == 0.0
