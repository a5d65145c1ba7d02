"""A model under a plan with fewer experts per token against a model that is built with fewer."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.ablation.allocation.cost import measured_load
from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.model.unions import layer_needs, measured_unions
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.ablation.small_models import config, model_of, rows_of

MOST = {"experts_per_token": 3, "num_experts": 4, "activation": "swiglu"}


@pytest.fixture(scope="module")
def model():
    return model_of(config(MOST, default=0.25))


@pytest.fixture
def plan(model):
    """The plan of the model, which is used again after the test."""
    yield model.sparsity_plan
    model.set_sparsity(SparsityPlan.from_config(model.config))


def built_with(model, number):
    """A model that shares the weights and has another A."""
    moe = model.config.moe.model_copy(update={"experts_per_token": number})
    other = Transformer(model.config.model_copy(update={"moe": moe}))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_fewer_experts_in_every_layer_are_a_model_with_a_smaller_a_to_the_bit(model, plan, number):
    tokens = torch.randint(1, 31, (2, 9))
    model.set_sparsity(plan.with_experts({0: number, 1: number}))
    found = []
    for one in (model, built_with(model, number)):
        out = one(tokens, tokens)
        grads = torch.autograd.grad(out.loss, list(one.parameters()))
        found.append([out.logits_BSV, out.loss, *grads, *out.stats.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_layer_has_its_own_number(model, plan):
    tokens = torch.randint(1, 31, (2, 9))
    model.set_sparsity(plan.with_experts({0: 1, 1: 0}))
    routed_LE = model(tokens).stats["router/routed_LE"]
    assert routed_LE.sum(-1).tolist() == [18, 0]
    model.set_sparsity(plan.with_top_p({1: 0.5}))
    used = model(tokens).stats["router/routed_LE"].sum(-1).tolist()
    assert used[0] == 54 and 18 < used[1] < 54


def test_the_load_adds_up_to_the_experts_in_use(model, plan):
    rows = rows_of()
    model.set_sparsity(plan.with_experts({0: 1}).with_top_p({1: 0.5}))
    load = measured_load(model, rows)
    assert sum(load[0]) == pytest.approx(1)
    (batch,) = rows.batches
    routed = model(batch.tokens_BS, documents_BS=batch.documents_BS, positions_BS=batch.positions_BS).stats
    assert load[1] == pytest.approx((routed["router/routed_LE"][1] / batch.tokens_BS.numel()).tolist())


def test_experts_that_a_token_does_not_use_need_no_weights(model, plan):
    tokens = torch.randint(1, 31, (6, 9), generator=torch.Generator().manual_seed(0))
    model.set_sparsity(plan.with_experts({0: 2, 1: 0}).with_top_p({0: 0.5}))
    needs = layer_needs(model, tokens)
    seen = []
    model.routers()[0].hook = seen.append
    model(tokens)
    model.routers()[0].hook = None
    last = seen[0].view(6, 9, 2)[:, -1]
    assert torch.equal(needs[0].experts_RA, last) and (last == -1).any() and (last != -1).sum() > 6
    # S at the input is 0.25 everywhere, so every row that is used selects 12 of 16 features.
    assert (needs[0].input_RAD.sum(-1)[last != -1] == 12).all()
    (one,) = measured_unions(model, tokens, [6], draws=1)
    assert one.routed == pytest.approx((last[last != -1].unique().numel() / 4 + 0) / 2)


def test_the_estimate_of_s_finds_nothing_in_experts_that_are_not_used(model, plan):
    model.set_sparsity(plan.with_experts({0: 2, 1: 0}).with_top_p({0: 0.5}))
    estimated = estimate(model, rows_of(), [0.75])
    by_layer = {(cell.layer, cell.expert is None): abs(estimated.total(cell)).sum() for cell in estimated.first}
    assert by_layer[1, False] == 0 and min(by_layer[0, False], by_layer[0, True], by_layer[1, True]) > 0
