"""The native engine with many settings at once, away from their middle values: each pair of them meets."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.inference import native as native_engine
from qsparse_moe.inference.cached_model import TorchDecode, prefill
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.inference.row_costs import NEVER
from qsparse_moe.inference.weights import round_weights
from qsparse_moe.kernels import native
from tests.inference.models import model, plan_per_expert, random_tokens

pytestmark = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja"
)
CAPACITY = 7
# Gates, biases, groups and scaling of every kind of router, shared experts and layers of other sizes than the experts.
ROUTED = {"num_experts": 6, "experts_per_token": 3, "expert_hidden_size": 37, "router_scaling_factor": 1.7}
SHARED = {"num_shared_experts": 2, "shared_expert_hidden_size": 52, "shared_expert_gate": True}
GROUPS = {"num_expert_groups": 3, "groups_per_token": 2, "bias_update_rate": 0.1}
HEADS = {"num_heads": 6, "num_kv_heads": 2, "head_size": 10, "qk_norm": True, "vocab_size": 263}
# The three loops of a weighted sum of values: whole groups of vectors, whole vectors, and the rest.
LARGE_HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_size": 84, "vocab_size": 267}
LARGE_HEADS |= {"qk_norm": "all_heads", "attention_bias": "all"}

COMBINATIONS = {
    "S per expert, codes, unit": {
        "hidden_size": 76,
        **HEADS,
        "moe": {**ROUTED, **SHARED, **GROUPS, "router": "sigmoid_topk_renormalized"},
        "sparsity": {"rescale": "unit", "quantization": {"activations": "int4", "weights": "ternary"}},
    },
    "S per expert, statistical, preserve": {
        "hidden_size": 68,
        **LARGE_HEADS,
        "moe": {**ROUTED, **SHARED, **GROUPS, "group_score": "max", "router": "softmax_topk", "activation": "swiglu"},
        "sparsity": {"selection": "statistical", "rescale": "preserve"},
    },
    "S per expert, blocks, int8 codes": {
        "hidden_size": 72,
        **HEADS,
        "tie_embeddings": True,
        "moe": {**ROUTED, "expert_hidden_size": 36, "router": "topk_softmax", "activation": "relu2", **SHARED},
        "sparsity": {
            "selection": "block",
            "group_size": 4,
            "rescale": "preserve",
            "quantization": {"activations": "int8"},
        },
    },
    "S per expert, thresholds, int4 codes": {
        "hidden_size": 100,
        **HEADS,
        "moe": {**ROUTED, **GROUPS, "router": "sigmoid_topk", "activation": "reglu", "num_dense_layers": 1}
        | {"dense_hidden_size": 101},
        "sparsity": {"selection": "threshold", "rescale": "unit", "quantization": {"activations": "int4"}},
    },
    "sparse router, relu": {
        "hidden_size": 76,
        **LARGE_HEADS,
        "tie_embeddings": True,
        "moe": {**ROUTED, **SHARED, "router_input": "sparse", "router": "softmax_topk", "activation": "drelu"},
        "sparsity": {"default": 0.3, "selection": "relu", "gradient": "masked", "rescale": "preserve"},
    },
    "sparse router, codes": {
        "hidden_size": 76,
        **HEADS,
        "moe": {
            **ROUTED,
            **SHARED,
            **GROUPS,
            "router_input": "sparse",
            "router": "sigmoid_topk",
            "activation": "reglu",
        },
        "sparsity": {"default": 0.8, "rescale": "unit", "quantization": {"activations": "int8", "weights": "ternary"}},
    },
}
FORMATS = {
    "S per expert, statistical, preserve": ("fp32", "int8"),
    "S per expert, blocks, int8 codes": ("fp32", "bf16"),
    "S per expert, thresholds, int4 codes": ("bf16", "int8"),
    "sparse router, relu": ("fp32", "bf16"),
}
CASES = [(name, weight_format) for name in COMBINATIONS for weight_format in FORMATS.get(name, (None,))]


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def built_for(name, weight_format=None):
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in COMBINATIONS[name].items()}
    built = model(**settings)
    for block in built.blocks():
        if block.moe is not None and block.moe.router.expert_bias is not None:
            block.moe.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 6).roll(2))
    if weight_format == "bf16":
        built = built.bfloat16().float()
    if weight_format is not None:
        round_weights(built, weight_format)
    if name.startswith("S per expert"):
        built.set_sparsity(plan_per_expert(built, built.config.sparsity.selection))
    return built


def differences(built, engine, batch, steps=3):
    """Return ``(steps, batch)``: largest difference per step and sequence, relative to the largest logit.

    The first sequences fill their cache in these steps, and the others had slid before.
    """
    caches = [
        KeyValueCache.allocate(built.config, batch=batch, capacity=CAPACITY, dtype=torch.float32, slides=True)
        for _ in range(2)
    ]
    prompts = [random_tokens(1 + place % 11, seed=place).tolist() for place in range(batch)]
    logits_BV, _ = (prefill(built, prompts, cache) for cache in caches)
    defining, found = TorchDecode(built), []
    for _ in range(steps):
        tokens_B = logits_BV.argmax(-1)
        logits_BV, other_BV = defining.decode(tokens_B, caches[0]), engine.decode(tokens_B, caches[1])
        found.append((logits_BV - other_BV).abs().amax(-1) / logits_BV.abs().max())
        for mine, own in ((caches[1].key_LBHPC, caches[0].key_LBHPC), (caches[1].value_LBHPC, caches[0].value_LBHPC)):
            mine.copy_(own)
    return torch.stack(found)


def engines(built, weight_format, *, few):
    """Yield the engine with its rows and order of gate and up in every way, or with ``few`` in the last one."""
    relu = built.config.moe.activation in ("relu2glu", "reglu", "drelu")
    gate_first = (False, True) if relu and weight_format in ("fp32", "bf16") else (False,)
    ways = [("all", False), *(("selected", first) for first in gate_first)]
    for rows, first in ways[-1:] if few else ways:
        by_integers = weight_format is None  # ternary products of codes are exact, products of int8 are rounded
        yield NativeDecode(built, weight_format, rows=rows, by_integers=by_integers, gate_first=first)


@pytest.mark.parametrize(("name", "weight_format"), CASES)
def test_many_settings_at_once_give_the_logits_of_the_training_model(name, weight_format, threads):
    built = built_for(name, weight_format)
    for engine in engines(built, weight_format, few=threads > 1):
        # One engine for all batches, so that its memory holds what a larger one has left in it.
        for batch in (11,) if threads > 1 else (3, 19, 1):
            # The median of the steps for every sequence: a near tie that rounding decides otherwise passes, a sequence
            # with the values of another one does not.
            worst_B = differences(built, engine, batch).median(0).values
            assert (worst_B < 2e-5).all(), (batch, engine.figures(), worst_B)


@pytest.mark.parametrize(("batch", "number"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_each_number_of_tokens_has_its_own_share_from_which_all_rows_are_read(batch, number, monkeypatch):
    built = model(
        num_layers=1,
        moe={"num_experts": 1, "experts_per_token": 1, "router": "softmax_topk", "activation": "swiglu"},
        sparsity={"default": 0.9},
    )
    for place in range(4):
        shares = [NEVER] * 4
        shares[place] = 0.01
        monkeypatch.setattr(native_engine, "shares_to_read_all", lambda weight_format, shares=shares: shares)
        engine = NativeDecode(built, "fp32", rows="auto")
        cache = KeyValueCache.allocate(built.config, batch=batch, capacity=4, dtype=torch.float32)
        engine.decode(torch.arange(batch) * 7, cache)
        figures = engine.figures()
        # qkv, output, gate, up and down.
        assert (figures["passes"], figures["passes_over_all_rows"]) == (5, 5 if place == number else 0)


@pytest.mark.parametrize("batch", [8, 9, 17])
def test_bytes_of_a_large_batch_are_those_of_its_groups_of_eight(batch):
    moe = {"num_experts": 1, "experts_per_token": 1, "router": "softmax_topk", "activation": "swiglu"}
    built = model(num_layers=1, moe={**moe, "num_shared_experts": 1, "shared_expert_hidden_size": 64})
    engine = NativeDecode(built, "fp32")
    cache = KeyValueCache.allocate(built.config, batch=batch, capacity=4, dtype=torch.float32)
    engine.decode(torch.arange(batch) * 7, cache)
    groups = -(-batch // 8)
    matrices = 64 * 3 * 64 + 64 * 64 + 3 * 64 * 32 + 3 * 64 * 64
    expected = 4 * groups * (matrices + built.head.weight.numel())
    figures = engine.figures()
    assert figures["bytes_read"] == figures["bytes_read_without_zeros"] == expected
    assert figures["passes"] == groups * 8


@pytest.mark.parametrize("selection", ["topk", "block"])
def test_among_equal_magnitudes_the_lower_index_is_selected(selection):
    built = model(
        num_layers=1,
        sparsity={"sites": {"attention_input": 0.5}, "default": 0.0, "selection": selection, "group_size": 8},
    )
    with torch.no_grad():
        # Every feature has one of two magnitudes, before the norm and after it.
        built.embedding.weight.copy_(built.embedding.weight.sign() * (1 + torch.arange(64) % 5 // 4))
        built.layers[0].attention_norm.weight.fill_(1.0)
    assert differences(built, NativeDecode(built, "fp32"), 4).max() < 1e-5


def test_swiglu_of_large_negative_and_positive_gates_is_that_of_the_training_model():
    built = model(moe={"activation": "swiglu"})
    with torch.no_grad():
        for block in built.blocks():
            # Far beyond the gates of a trained model: e^x is 0 at one end and reaches the limit of fp32 at the other.
            block.moe.experts.w_gate.mul_(40.0)
    assert differences(built, NativeDecode(built, "fp32"), 4).max() < 1e-5
