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
