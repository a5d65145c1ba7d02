"""The router's choices, weights, losses and sums."""

import pytest
import torch

from qsparse_moe.config.schema import MoEConfig
from qsparse_moe.moe.losses import load_balance_loss, router_z_loss
from qsparse_moe.moe.router import Router, router_stats

E, A, D, T = 6, 2, 8, 10


def make(kind, dtype=torch.float32):
    router = Router(D, MoEConfig(num_experts=E, experts_per_token=A, router=kind)).to(dtype)
    torch.nn.init.normal_(router.weight)
    return router


def test_the_three_kinds_choose_the_same_experts_with_their_own_weights():
    x = torch.randn(T, D)
    plain = make("softmax_topk")
    logits = x @ plain.weight.T
    top_probs, top_ids = logits.softmax(-1).topk(A)
    routing = plain(x)
    assert torch.equal(routing.expert_ids_TA, top_ids)
    torch.testing.assert_close(routing.weights_TA, top_probs)
    for kind in ("softmax_topk_renormalized", "topk_softmax"):
        router = make(kind)
        router.load_state_dict(plain.state_dict())
        torch.testing.assert_close(router(x).weights_TA, top_probs / top_probs.sum(-1, keepdim=True))


def test_logits_and_weights_are_fp32_under_a_bf16_model():
    router = make("softmax_topk", torch.bfloat16)
    x = torch.randn(T, D).bfloat16()
    routing = router(x)
    assert {t.dtype for t in (routing.weights_TA, routing.probs_TE, routing.logits_TE)} == {torch.float32}
    torch.testing.assert_close(routing.logits_TE, x.float() @ router.weight.float().T)


def written_out_balance(probs, ids):
    total = 0.0
    for sequence in range(len(probs)):
        for expert in range(E):
            share = (ids[sequence] == expert).float().mean()
            total = total + E * share * probs[sequence, :, expert].mean()
    return total / len(probs)


def test_balance_loss_and_its_gradient_match_the_written_out_sum():
    probs = torch.randn(3, 5, E).softmax(-1).requires_grad_()
    ids = torch.randint(0, E, (3, 5, A))
    got, want = load_balance_loss(probs, ids), written_out_balance(probs, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, probs)[0] for loss in (got, want)))


def test_balance_loss_is_one_when_even_and_e_when_all_go_to_one():
    even_ids = torch.arange(E).view(1, E // A, A)
    assert load_balance_loss(torch.full((1, E // A, E), 1 / E), even_ids).item() == pytest.approx(1.0)
    certain = torch.nn.functional.one_hot(torch.zeros(1, 4, dtype=torch.long), E).float()
    assert load_balance_loss(certain, torch.zeros(1, 4, 1, dtype=torch.long)).item() == pytest.approx(E)


def test_z_loss_is_the_mean_squared_logsumexp():
    logits = torch.randn(T, E)
    torch.testing.assert_close(router_z_loss(logits), logits.exp().sum(-1).log().square().mean())


def test_sums_are_over_tokens():
    routing = make("softmax_topk")(torch.randn(T, D))
    stats = router_stats(routing)
    assert stats["tokens"] == T
    assert stats["probability_E"].sum().item() == pytest.approx(T, rel=1e-6)
    entropy = torch.distributions.Categorical(probs=routing.probs_TE).entropy().sum()
    assert stats["choice_entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert stats["first_weight"].item() == pytest.approx(routing.probs_TE.max(-1).values.sum().item(), rel=1e-6)
