"""A model of transformers with Q-Sparse inside computes what our own model computes, and what the definition says."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe import build_model
from qsparse_moe.config.schema import SparsityConfig
from qsparse_moe.interop.drop_in.calibration import calibrate
from qsparse_moe.interop.drop_in.model import densify, set_sparsity, sparsify
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.checkpoint.state import load_model
from tests.interop.drop_in_models import MODELS, VOCABULARY, build, reference, tokens, uniform_plan, varied_plan
from tests.interop.test_hugging_face import gradients_by_our_names, relative

pytest.importorskip("transformers")
PLANS = {"uniform": uniform_plan, "varied": varied_plan}
SELECTIONS = {
    "topk-ste": {"selection": "topk", "gradient": "ste"},
    "topk-masked": {"selection": "topk", "gradient": "masked"},
    "topk-unit": {"selection": "topk", "rescale": "unit"},
    "topk-preserve": {"selection": "topk", "rescale": "preserve", "gradient": "masked"},
    "block-ste": {"selection": "block", "group_size": 8},
    "block-masked": {"selection": "block", "group_size": 8, "gradient": "masked"},
    "threshold-ste": {"selection": "threshold"},
    "threshold-masked": {"selection": "threshold", "gradient": "masked"},
    "statistical-masked": {"selection": "statistical", "gradient": "masked"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


def run(model):
    """The logits, and the gradient of every parameter for a random upstream gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(tokens()).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, want):
    assert relative(found[0], want[0]) < 2e-6
    for name, gradient in want[1].items():
        # The gradient of an expert without tokens is zeros in one implementation and absent in the other.
        have = torch.zeros_like(gradient) if found[1][name] is None else found[1][name]
        assert (have - gradient).abs().max() <= 5e-6 * gradient.abs().max() + 1e-12, name


@pytest.mark.parametrize("gradient", ["ste", "masked"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_family_computes_the_definition(model, plan, gradient):
    wanted = PLANS[plan](model)
    with reference(model, wanted, gradient):
        want = run(model)
    sparsify(model, wanted, gradient=gradient)
    try:
        assert_same(run(model), want)
    finally:
        densify(model)


def test_other_widths_activations_and_dtypes_compute_the_definition():
    # Widths that are no multiples of 8 and fp64 have no grouped product; of the activations, only SwiGLU is fused.
    odd = {"hidden_size": 44, "num_attention_heads": 2, "intermediate_size": 14, "hidden_act": "gelu"}
    for model in (build("mixtral", **odd), build("mixtral").double()):
        plan = varied_plan(model)
        with reference(model, plan, "masked"):
            want = run(model)
        sparsify(model, plan, gradient="masked")
        assert_same(run(model), want)


def test_without_sparsity_and_after_densify_every_bit_is_that_of_the_model(model):
    has_experts = hasattr(model.config, "num_experts_per_tok")
    for experts in ("eager", "grouped_mm", "batched_mm") if has_experts else ("eager",):
        if has_experts:
            model.set_experts_implementation(experts)
        names, settings = list(model.state_dict()), model.config.to_dict()
        before = run(model)
        sparsify(model, 0.5)
        assert list(model.state_dict()) == names
        assert relative(run(model)[0], before[0]) > 0.01
        set_sparsity(model, 0.0)
        dense = run(model)
        densify(model)
        for logits, gradients in (dense, run(model)):
            assert torch.equal(logits, before[0])
            assert all(torch.equal(gradients[name], gradient) for name, gradient in before[1].items())
        assert model.config.to_dict() == settings
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def imported(request, tmp_path_factory):
    """A model of transformers with what our import makes of its folder, and a plan with thresholds."""
    theirs, folder = build(request.param), tmp_path_factory.mktemp("models") / request.param
    theirs.save_pretrained(folder)
    plans = {name: calibrate(theirs, [tokens(8, 40, seed=4)], make(theirs)) for name, make in PLANS.items()}
    return theirs, HuggingFaceWeights(folder), plans


def ours_like(weights, plan, settings):
    sparsity = SparsityConfig.model_validate(settings)
    model = build_model(weights.model.model_copy(update={"sparsity": sparsity}))
    load_model(model, weights.tensor, weights.shapes)
    model.set_sparsity(plan)
    return model


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_our_own_model_with_the_same_weights_and_plan_computes_the_same(imported, selection, plan):
    theirs, weights, plans = imported
    settings, upstream = SELECTIONS[selection], torch.randn(2, 11, VOCABULARY)
    ours = ours_like(weights, plans[plan], settings)
    sparsify(theirs, plans[plan], **settings)
    try:
        theirs.zero_grad(set_to_none=True)
        want, found = ours(tokens()).logits_BSV, theirs(tokens()).logits
        want.backward(upstream)
        found.backward(upstream)
    finally:
        densify(theirs)
    assert relative(found, want) < 2e-6
    gradients = gradients_by_our_names(theirs, weights.model)
    for name, parameter in ours.named_parameters():
        largest = parameter.grad.abs().max()
        assert (gradients[name] - parameter.grad).abs().max() <= 5e-6 * largest + 1e-12, name


def test_a_plan_with_one_sparse_expert_leaves_all_other_tokens_as_they_were(imported):
    theirs, _, _ = imported
    layer = theirs.config.num_hidden_layers - 1
    dense = theirs(tokens(), output_router_logits=True)
    chosen = dense.router_logits[-1].topk(2).indices.view(2, 11, 2)
    plan = SparsityPlan({place: (0.0,) * len(values) for place, values in uniform_plan(theirs).values.items()})
    for site in ("expert_input", "expert_hidden"):
        plan = plan.with_(sparsity=0.6, layer=layer, site=site, experts=[2])
    sparsify(theirs, plan)
    try:
        sparse = theirs(tokens()).logits
    finally:
        densify(theirs)
    differs = (sparse - dense.logits).abs().amax(-1) > 1e-4
    assert torch.equal(differs, (chosen == 2).any(-1)) and differs.any() and not differs.all()
