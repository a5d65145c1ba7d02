"""The whole model against a forward pass that is written out token by token in float64.

Norm weights, head sizes, epsilon and the number of key-value heads are such that no two of them can be exchanged.
"""

from __future__ import annotations

import math

import pytest
import torch

from qsparse_moe.sparsity.topk import topk_mask_reference
from tests.model.small_model import VOCAB, make, tokens

torch.set_num_threads(1)
D, LAYERS, HEADS, KV_HEADS, C, E, A, F, SHARED, DENSE = 24, 3, 4, 2, 10, 5, 2, 14, 18, 22
EPSILON = 0.3
"""As large as the squares of the hidden states, so that each of the norms shows where it is another."""
SPARSITY = {
    "attention_input": 0.25,
    "attention_output": 0.4,
    "expert_input": 0.5,
    "expert_hidden": 0.35,
    "shared_input": 0.6,
    "shared_hidden": 0.3,
    "dense_input": 0.2,
    "dense_hidden": 0.55,
}


def built():
    model = make(
        hidden_size=D,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=C,
        qk_norm=True,
        norm_epsilon=EPSILON,
        rope_theta=50.0,
        init_std=0.5,
        sparsity={"sites": SPARSITY, "backend": "torch"},
        moe={
            "num_experts": E,
            "experts_per_token": A,
            "expert_hidden_size": F,
            "num_shared_experts": 1,
            "shared_expert_hidden_size": SHARED,
            "num_dense_layers": 1,
            "dense_hidden_size": DENSE,
            "router": "softmax_topk",
            "router_scaling_factor": 1.7,
            "load_balance_coefficient": 0.3,
            "router_z_coefficient": 0.07,
            "activation": "swiglu",
            "backend": "loop",
        },
    ).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel())[torch.randperm(parameter.numel())])
    return model


def normed(x, weight):
    return x / (x.square().mean() + EPSILON).sqrt() * weight


def sparse(x, site):
    num_selected = max(1, round((1 - SPARSITY[site]) * len(x)))
    return x * topk_mask_reference(x[None], num_selected)[0]


def turned(head, position):
    half, turned = C // 2, head.clone()
    for i in range(half):
        angle = position / 50.0 ** (2 * i / C)
        turned[i] = head[i] * math.cos(angle) - head[i + half] * math.sin(angle)
        turned[i + half] = head[i + half] * math.cos(angle) + head[i] * math.sin(angle)
    return turned


def attended(rows, weights, prefix):
    """The attention of one sequence: a list of its rows before the residual."""
    qkv = [sparse(x, "attention_input") @ weights[f"{prefix}qkv.weight"].T for x in rows]
    parts = [x.view(HEADS + 2 * KV_HEADS, C) for x in qkv]
    results = []
    for s in range(len(rows)):
        heads = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            query = turned(normed(parts[s][h], weights[f"{prefix}query_norm.weight"]), s)
            keys = [turned(normed(parts[t][HEADS + kv], weights[f"{prefix}key_norm.weight"]), t) for t in range(s + 1)]
            shares = torch.stack([query @ key / math.sqrt(C) for key in keys]).softmax(0)
            heads.append(sum(shares[t] * parts[t][HEADS + KV_HEADS + kv] for t in range(s + 1)))
        mixed = sparse(torch.cat(heads), "attention_output")
        results.append(mixed @ weights[f"{prefix}output.weight"].T)
    return results


def gated(x, gate, up, down, part):
    x = sparse(x, f"{part}_input")
    hidden = torch.nn.functional.silu(x @ gate) * (x @ up)
    return sparse(hidden, f"{part}_hidden") @ down


def fed_forward(x, weights, prefix, routing):
    if f"{prefix}dense.w_up" in weights:
        return gated(x, *(weights[f"{prefix}dense.{name}"] for name in ("w_gate", "w_up", "w_down")), "dense")
    logits = x @ weights[f"{prefix}moe.router.weight"].T
    probs = logits.softmax(0)
    chosen = probs.argsort(descending=True)[:A].tolist()
    routing.append((logits, probs, chosen))
    total = gated(x, *(weights[f"{prefix}moe.shared.{name}"] for name in ("w_gate", "w_up", "w_down")), "shared")
    for expert in chosen:
        own = (weights[f"{prefix}moe.experts.{name}"][expert] for name in ("w_gate", "w_up", "w_down"))
        total = total + 1.7 * probs[expert] * gated(x, *own, "expert")
    return total


def forward_by_hand(weights, tokens_BS):
    """Logits, and per MoE layer the routing of all tokens."""
    hidden = [[weights["embedding.weight"][i] for i in row] for row in tokens_BS.tolist()]
    routings = []
    for layer in range(LAYERS):
        prefix, routing = f"layers.{layer}.", []
        for rows in hidden:
            before = [normed(x, weights[f"{prefix}attention_norm.weight"]) for x in rows]
            rows[:] = [x + y for x, y in zip(rows, attended(before, weights, f"{prefix}attention."), strict=True)]
            for s, x in enumerate(rows):
                inner = normed(x, weights[f"{prefix}feed_forward_norm.weight"])
                rows[s] = x + fed_forward(inner, weights, prefix, routing)
        if routing:
            routings.append(routing)
    last = [[normed(x, weights["final_norm.weight"]) @ weights["head.weight"].T for x in rows] for rows in hidden]
    return torch.stack([torch.stack(rows) for rows in last]), routings


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(2)
    model, tokens_BS = built(), tokens(2, 5)
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    return model, tokens_BS, *forward_by_hand(weights, tokens_BS)


def close(found, want):
    # The angles of the rotation are rounded to fp32 in a model of any precision.
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_logits_are_those_of_the_equations(case):
    model, tokens_BS, logits, _ = case
    assert logits.shape == (2, 5, VOCAB)
    close(model(tokens_BS).logits_BSV, logits)


def test_the_loss_is_that_of_the_equations_with_each_term_under_its_coefficient(case):
    model, tokens_BS, logits, routings = case
    labels = tokens_BS.clone()
    labels[1, 2] = -100
    chances = logits.log_softmax(-1)
    predicted = [(b, s, labels[b, s + 1].item()) for b in range(2) for s in range(4) if labels[b, s + 1] != -100]
    lm_loss = -sum(chances[b, s, token] for b, s, token in predicted) / len(predicted)
    balance = z = 0.0
    for routing in routings:
        # By default each sequence is balanced by itself.
        for sequence in (routing[:5], routing[5:]):
            counts = [sum(expert in chosen for _, _, chosen in sequence) for expert in range(E)]
            means = sum(probs for _, probs, _ in sequence) / 5
            balance += E * sum(count / (A * 5) * mean for count, mean in zip(counts, means, strict=True)) / 2
        z += sum(logits.exp().sum().log() ** 2 for logits, _, _ in routing) / len(routing)
    balance, z = balance / len(routings), z / len(routings)
    output = model(tokens_BS, labels)
    found = {name: value.item() for name, value in output.losses.items()}
    want = {"lm_loss": lm_loss, "load_balance_loss": balance, "router_z_loss": z}
    assert found == pytest.approx({name: float(value) for name, value in want.items()}, rel=1e-6)
    assert output.loss.item() == pytest.approx(float(lm_loss + 0.3 * balance + 0.07 * z), rel=1e-6)


def test_ids_without_a_token_have_no_probability_in_evaluation_and_their_own_in_training(case):
    model, tokens_BS, logits, _ = case
    try:
        model.hide_ids([3, 7])
        close(model.train()(tokens_BS).logits_BSV, logits)
        found = model.eval()(tokens_BS).logits_BSV
        assert (found[..., [3, 7]] == -torch.inf).all()
        shown = [i for i in range(VOCAB) if i not in (3, 7)]
        close(found[..., shown], logits[..., shown])
        model.hide_ids([])
        close(model(tokens_BS).logits_BSV, logits)
    finally:
        model.train()
