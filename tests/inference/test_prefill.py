"""Prefill of int8 weights multiplies in bf16 where that is fast, with less error than the weights themselves have."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.inference import engine as engines
from qsparse_moe.inference.cached_model import TorchDecode, prefill
from qsparse_moe.inference.engine import prepare_prefill
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.memory import MemoryDtypes, prefill_bytes
from qsparse_moe.inference.weights import products_dtype, round_weights, site_matrices
from qsparse_moe.kernels import onednn
from tests.inference.models import model, random_tokens

CPU = torch.device("cpu")
TOKENS = [random_tokens(24, seed=seed).tolist() for seed in range(4)]
SETTINGS = {
    "dense": {},
    "sparse": {"sparsity": {"default": 0.5}},
    "shared experts, a dense layer": {"moe": {"num_shared_experts": 1, "num_dense_layers": 1}},
}


class OwnMatrices:
    """Stands for an engine that has stored the weights."""

    name = "native"


class NoMatrices:
    name = "torch"


@pytest.fixture
def fast_bf16(monkeypatch):
    """A processor with instructions for bf16, whichever runs the test."""
    monkeypatch.setattr(engines, "has_bf16_instructions", lambda device: True)


def first_logits(built):
    cache = KeyValueCache.allocate(built.config, batch=len(TOKENS), capacity=24, dtype=torch.float32)
    return prefill(built, TOKENS, cache)


def distance(logits, exact):
    return ((logits - exact).square().mean() / exact.square().mean()).sqrt().item()


def rounded_to_int8(**settings):
    built = model(**settings)
    round_weights(built, "int8")
    return built


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_bf16_products_cost_less_than_int8_weights(fast_bf16, settings):
    # Weights with which rounding moves no token to another expert, which would change its logits by more.
    seeded = settings | {"seed": 4}
    exact, int8 = first_logits(model(**seeded)), first_logits(rounded_to_int8(**seeded))
    built = rounded_to_int8(**seeded)
    prepare_prefill(built, OwnMatrices(), "int8")
    found = first_logits(built)
    assert found.dtype == torch.float32
    assert 1e-4 < distance(found, int8) < distance(int8, exact)


def test_the_matrices_take_half_the_memory_and_nothing_else_is_rounded(fast_bf16):
    built, before = rounded_to_int8(**SETTINGS["shared experts, a dense layer"]), {}
    for name, parameter in rounded_to_int8(**SETTINGS["shared experts, a dense layer"]).named_parameters():
        before[name] = parameter
    prepare_prefill(built, OwnMatrices(), "int8")
    matrices = {matrix.name for matrix in site_matrices(built)}
    assert products_dtype(built) == torch.bfloat16 and "layers.1.moe.experts.w_up" in matrices
    for name, parameter in built.named_parameters():
        expected = before[name].bfloat16() if name in matrices else before[name]
        assert torch.equal(parameter, expected) and parameter.dtype == expected.dtype, name


@pytest.mark.parametrize(
    ("engine", "weights", "is_fast"),
    [(NoMatrices, "int8", True), (OwnMatrices, "int8", False), (OwnMatrices, "fp32", True), (OwnMatrices, None, True)],
    ids=["an engine without its own copy", "no instructions", "fp32", "the model's own"],
)
def test_all_other_prefill_stays_in_fp32(monkeypatch, engine, weights, is_fast):
    monkeypatch.setattr(engines, "has_bf16_instructions", lambda device: is_fast)
    built = rounded_to_int8()
    expected = first_logits(built)
    prepare_prefill(built, engine(), weights)
    assert products_dtype(built) == torch.float32 and torch.equal(first_logits(built), expected)


def test_every_engine_says_whether_the_model_may_change():
    assert {spec.name for spec in engines.ENGINES if spec.has_own_matrices} == {"native", "triton"}
    assert TorchDecode.name not in {spec.name for spec in engines.ENGINES if spec.has_own_matrices}


@pytest.mark.parametrize(
    ("capabilities", "slow", "expected"),
    [
        ({"avx512_f": True}, False, False),
        ({"avx512_bf16": True}, False, True),
        ({"amx_bf16": True}, False, True),
        ({"avx512_bf16": True}, True, False),
    ],
)
def test_instructions_for_bf16_are_those_of_the_processor(monkeypatch, capabilities, slow, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(onednn, "_HAS_AVX512", not slow)
    assert onednn.has_bf16_instructions(CPU) == expected
    assert not onednn.has_bf16_instructions(torch.device("meta"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not onednn.has_bf16_instructions(CPU)


def test_the_memory_of_a_prefill_counts_activations_and_the_copies_of_products():
    config = model(moe={"experts_per_token": 2}).config  # D 64, F 32
    fp32, bf16 = torch.float32, torch.bfloat16
    per_token = 8 * 64 + 2 * (2 * 64 + 3 * 32)
    assert prefill_bytes(config, num_tokens=7, dtypes=MemoryDtypes(fp32, fp32, fp32)) == 7 * 4 * per_token
    assert prefill_bytes(config, num_tokens=7, dtypes=MemoryDtypes(fp32, bf16, bf16)) == 7 * 2 * per_token
    copies = 2 * (64 + 32) * 2
    assert prefill_bytes(config, num_tokens=7, dtypes=MemoryDtypes(fp32, fp32, bf16)) == 7 * (4 * per_token + copies)
