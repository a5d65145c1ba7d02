"""Decode engines under features that all tokens of an expert share: only their rows and columns are stored and read."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.inference.gather_engine import GatherDecode
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.inference.weights import round_weights
from qsparse_moe.kernels import native
from qsparse_moe.kernels.row_product.stored import load_dense, store
from qsparse_moe.model.transformer import measured_energies
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.inference.models import difference_from_torch, model, plan_per_expert, random_tokens
from tests.inference.test_latent_attention import RANKED

needs_compiler = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja"
)


def shared_model(sparsity=(), **settings):
    """A model with sets of one measurement; every part reads other features."""
    shared = {"default": 0.5, "selection": "shared", "gradient": "masked"} | dict(sparsity)
    built = model(sparsity=shared, **settings).train()
    with torch.no_grad():
        built.update_shared_sets(measured_energies(built(random_tokens(2, 16), with_stats=False).stats))
    return built.eval()


MASKED = {"shared": {"products": "masked"}}
EVERY_PART = {"num_shared_experts": 1, "num_dense_layers": 1}
MODELS = {
    "every part": {"moe": EVERY_PART},
    "gate first": {"moe": {"activation": "relu2glu"}, "sparsity": {"sites": {"expert_input": 0.25}}},
    "without a gate": {"moe": {"activation": "relu2"}},
    "dense inputs": {"sparsity": {"sites": {"expert_input": 0.0, "attention_input": 0.0}}},
    "dense hidden features": {"sparsity": {"sites": {"expert_hidden": 0.0, "attention_output": 0.0}}},
    "rows of codes": {"moe": EVERY_PART, "sparsity": MASKED | {"quantization": {"activations": "int8"}}},
    "unit": {"moe": EVERY_PART, "sparsity": MASKED | {"rescale": "unit"}},
    "latent attention": {"latent_attention": RANKED},
    "preserve": {"moe": EVERY_PART, "sparsity": MASKED | {"rescale": "preserve"}},
}


def check(built, weight_format=None, prompts=(4, 2, 7)):
    engine = NativeDecode(built, weight_format, by_integers=False)
    assert difference_from_torch(built, engine, prompts, capacity=9, steps=3) < 1e-5


@needs_compiler
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_native_logits_under_shared_features_are_those_of_the_training_model(settings):
    check(shared_model(**settings))


@needs_compiler
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "ternary"])
def test_the_values_of_number_formats_do_not_depend_on_the_features_left_out(weight_format):
    # The scale of int8 is that of a whole row, and that of ternary of a whole matrix.
    quantization = {"quantization": {"weights": "ternary"}} if weight_format == "ternary" else {}
    built = shared_model(quantization, moe=EVERY_PART)
    if weight_format == "bf16":
        built = built.bfloat16().float()
    round_weights(built, weight_format)
    check(built, weight_format)


@needs_compiler
@pytest.mark.parametrize("batch", [1, 9])
def test_experts_with_sets_of_different_sizes_decode_as_in_training(batch):
    built = shared_model(moe=EVERY_PART)
    built.set_sparsity(plan_per_expert(built, "shared"))
    check(built, prompts=tuple(range(1, batch + 1)))


def test_the_gather_engine_has_the_logits_of_the_training_model_under_shared_features():
    built = shared_model(moe=EVERY_PART)
    assert difference_from_torch(built, GatherDecode(built), (4, 2, 7), capacity=9, steps=3) < 1e-5


@needs_compiler
def test_an_engine_stores_and_reads_the_selected_rows_and_columns_only():
    # SwiGLU, which leaves no zeros of its own.
    moe = {"activation": "swiglu"}
    built = shared_model({"default": 0.75, "sites": {"attention_input": 0.0, "attention_output": 0.0}}, moe=moe)
    engine, whole = NativeDecode(built), NativeDecode(model(moe=moe))
    cache_and_prompt = {"capacity": 9, "steps": 1}
    difference_from_torch(built, engine, (4,), **cache_and_prompt)
    figures = engine.figures()
    # Two layers: gate and up of 16 x 8 padded to 32 columns, down of 8 x 64, of two experts; attention and head whole.
    experts, others = 2 * 2 * (2 * 16 * 32 + 8 * 64), 2 * (64 * 192 + 64 * 64) + 64 * built.head.weight.shape[0]
    assert figures["bytes_read"] == 4 * (experts + others)
    assert figures["bytes_read_without_zeros"] == 4 * (2 * 2 * 3 * 64 * 32 + others)
    # Four experts are stored.
    assert whole.figures()["weight_bytes"] - figures["weight_bytes"] == 4 * 2 * (2 * 2 * 3 * 64 * 32 - experts)


@needs_compiler
def test_another_plan_needs_an_engine_that_has_left_out_nothing():
    built = shared_model(moe=EVERY_PART)
    sparse, dense = built.sparsity_plan, SparsityPlan.uniform(built.config, 0.0)
    built.set_sparsity(dense)
    engine = NativeDecode(built)
    built.set_sparsity(sparse)
    later = engine.with_plan_of(built)
    assert difference_from_torch(built, later, (4, 2), capacity=9, steps=2) < 1e-5
    assert later.with_plan_of(built)._stored["layers.1.moe.experts.w_up"] is later._stored["layers.1.moe.experts.w_up"]
    built.set_sparsity(dense)
    with pytest.raises(ValueError, match="has the features of another plan only; build an engine with S = 0 first"):
        later.with_plan_of(built)


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "ternary"])
def test_kept_rows_and_columns_of_stored_matrices_have_the_values_of_the_whole_ones(weight_format):
    stored = store(torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)), weight_format)
    rows, columns = torch.tensor([[4, 0], [1, 3]]), torch.tensor([[299, 2, 17], [5, 0, 256]])
    kept = stored.keep(rows, columns)
    for which in (0, 1):
        whole = load_dense(stored, which)
        assert torch.equal(load_dense(kept, which), whole[rows[which]][:, columns[which]])
        assert torch.equal(load_dense(stored.keep(None, columns), which), whole[:, columns[which]])
    assert kept.whole_bytes == stored.num_rows * stored.data.shape[1] > kept.num_rows * kept.data.shape[1]
