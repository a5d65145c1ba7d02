"""The losses of transformers' models and ours: how their load-balance losses are related, and gradients with them."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.moe.losses import BalanceTerms, load_balance_loss
from tests.interop.hugging_face_models import build, save
from tests.interop.test_hugging_face import gradients_by_our_names, read, relative, tokens

pytest.importorskip("transformers")
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-dense-first", "olmoe", "qwen2_moe-every-second"])
def test_the_balance_loss_is_that_of_transformers_over_the_experts_per_token(tmp_path, name):
    """Both are E times a sum over the experts of a load and a mean probability. Our load is the share of the routed
    tokens, which sums to 1; theirs counts every token A times and sums to A. They pool the tokens of all layers, and we
    average the losses of the layers: theirs of each layer alone is A times ours of that layer, and theirs of all layers
    is A times ours of the pooled loads and probabilities."""
    theirs = build(name)
    ours = read(save(theirs, tmp_path / "model"), load_balance_scope="micro_batch")
    moe = ours.config.moe
    with torch.no_grad():
        want = theirs(tokens(), output_router_logits=True)
        found = ours(tokens(), tokens())
    sizes = (moe.num_experts, moe.experts_per_token)
    layers = [load_balancing_loss_func((logits,), *sizes) / moe.experts_per_token for logits in want.router_logits]
    assert found.losses["load_balance_loss"].item() == pytest.approx(sum(layers).item() / len(layers), rel=2e-6)
    routed_LE, probs_LE = found.stats["router/routed_LE"], found.stats["router/probability_LE"] / tokens().numel()
    pooled = load_balance_loss(BalanceTerms(routed_LE.sum(0), probs_LE.mean(0)))
    assert want.aux_loss.item() == pytest.approx(moe.experts_per_token * pooled.item(), rel=2e-6)
    assert want.aux_loss.item() != pytest.approx(moe.experts_per_token, rel=1e-3), "an even load would compare nothing"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-renormalized", "olmoe", "qwen2_moe"])
def test_the_gradients_of_the_whole_loss_are_those_of_transformers_with_its_coefficient_times_the_experts(
    tmp_path, name
):
    """With one layer, the two forms of the balance loss differ by the factor A alone."""
    theirs = build(name, num_hidden_layers=1, router_aux_loss_coef=0.3)
    folder = save(theirs, tmp_path / "model")
    experts_per_token = theirs.config.num_experts_per_tok
    ours = read(
        folder,
        load_balance_scope="micro_batch",
        load_balance_coefficient=0.3 * experts_per_token,
        router_z_coefficient=0.0,
    )
    want = theirs(tokens(), labels=tokens(), output_router_logits=True).loss
    found = ours(tokens(), tokens()).loss
    assert found.item() == pytest.approx(want.item(), rel=2e-6)
    want.backward()
    found.backward()
    gradients = gradients_by_our_names(theirs, ours.config)
    for parameter_name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[parameter_name]) <= 5e-6, parameter_name
