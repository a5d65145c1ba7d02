"""The output head in a number format of its own: every engine computes with the rounded model, and reports it."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.cached_model import prefill
from qsparse_moe.inference.engine import EngineSettings, resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.weights import check_head, head_format, own_format, use_weights
from qsparse_moe.kernels import native, tiles
from qsparse_moe.kernels.row_product.stored import load_dense, store, with_scales_per_output
from tests.inference.models import all_at_once, difference_from_torch, model

CPU = torch.device("cpu")
TERNARY = {"sparsity": {"default": 0.5, "quantization": {"weights": "ternary"}}}
ENGINES = [
    "torch",
    "gather",
    pytest.param("native", marks=pytest.mark.skipif(native.why_not(CPU) is not None, reason="needs a C++ compiler")),
    pytest.param("triton", marks=pytest.mark.skipif(tiles.why_not(CPU) is not None, reason="needs Triton")),
]


def engine_of(name, built, weights, head):
    return resolve_engine(name, built, settings=EngineSettings(*use_weights(built, weights, head)))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("settings", "weights", "head"),
    [(TERNARY, "ternary", "int8"), (TERNARY, "auto", "bf16"), ({}, "int8", "fp32"), ({}, "auto", "int8")],
    ids=["int8 beside ternary", "bf16 beside ternary", "fp32 beside int8", "int8 beside fp32"],
)
def test_logits_are_those_of_the_model_with_the_rounded_head(name, settings, weights, head):
    built, exact = model(**settings), model(**settings)
    engine = engine_of(name, built, weights, head)
    # Rounded as requested, without the matrices.
    moved = (built.head.weight - exact.head.weight).abs().amax(-1)
    step = exact.head.weight.abs().amax(-1)
    bounds = {"int8": step / 127 * 0.501, "bf16": step / 256, "fp32": 0 * step}
    assert (moved <= bounds[head]).all() and moved.any() == (head != "fp32")
    assert torch.equal(built.layers[0].attention.qkv.weight, exact.layers[0].attention.qkv.weight) == (
        weights != "int8"
    )
    # The native engine rounds features to 15 bits where it multiplies codes of weights (test_native).
    has_codes = weights == "int8" or settings == TERNARY
    allowed = 1e-3 if name == "native" and has_codes else 1e-5
    assert difference_from_torch(built, engine, (4, 2), capacity=5, steps=3) < allowed
    figures = engine.figures()
    assert (figures["weights"], figures["head"]) == (own_format(exact) if weights == "auto" else weights, head)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("head", ["int8", "bf16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_tokens_of_ternary_weights_are_those_of_all_tokens_at_once(name, head, seed):
    # Features in 15 bits (test_native) let a near tie of a selection fall otherwise within 32 tokens: none is selected.
    settings = {"sparsity": {"quantization": {"weights": "ternary"}}} if name == "native" else TERNARY
    built = model(seed=seed, **settings)
    engine = engine_of(name, built, "auto", head)
    num_tokens = 6 if name == "triton" else 32
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=num_tokens + 4, dtype=torch.float32)
    tokens = [7, 100, 3]
    logits = [prefill(built, [tokens], cache)]
    for _ in range(num_tokens):
        tokens.append(int(logits[-1].argmax()))
        logits.append(engine.decode(torch.tensor(tokens[-1:]), cache))
    expected = all_at_once(built, torch.tensor([tokens]))[0, 2:]
    assert expected.argmax(-1).tolist()[:-1] == tokens[3:]
    allowed = 1e-3 if name == "native" else 1e-4
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=allowed * expected.abs().max().item())


@pytest.mark.parametrize("name", ENGINES[2:])
def test_an_int8_head_of_a_model_in_bf16_has_the_codes_of_the_rounded_head(name):
    # The model keeps the rounded head in bf16, whose rounding moves no code: within a step of bf16 they are equal.
    built, wide = model(torch.bfloat16), model(torch.bfloat16).float()
    for one in (built, wide):
        use_weights(one, "auto", "int8")
    assert torch.equal(*(store(one.head.weight, "int8").data for one in (built, wide)))
    engine = resolve_engine(name, built, settings=EngineSettings(head="int8"))
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=2, dtype=torch.float32)
    found = engine.decode(torch.tensor([7]), cache)
    expected = all_at_once(wide, torch.tensor([[7]]))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-8 * expected.abs().max().item())


@pytest.mark.parametrize("num_outputs", [1, 33, 264])
def test_scales_per_output_multiply_the_product(num_outputs):
    weights_OD = torch.randn(num_outputs, 48, generator=torch.Generator().manual_seed(0))
    codes, scales_O = with_scales_per_output(weights_OD)
    rounded_OD = load_dense(store(weights_OD, "int8"))
    torch.testing.assert_close(load_dense(codes) * scales_O, rounded_OD.T, rtol=1e-6, atol=0)
    assert codes.data.is_contiguous() and codes.num_bytes == 48 * (-(-num_outputs // 64) * 64) + 48 * 4


def test_the_format_follows_from_the_matrices_unless_it_is_given():
    built = model()
    assert [head_format(built, name) for name in ("fp32", "ternary", "int8")] == ["fp32", "fp32", "int8"]
    assert head_format(built.bfloat16(), "ternary") == "bf16"
    assert [head_format(built, "int8", requested) for requested in ("bf16", "fp32")] == ["bf16", "fp32"]


@pytest.mark.parametrize(
    ("head", "dtype", "message"),
    [
        ("ternary", None, r"head \('ternary'\) must be one of auto, fp32, bf16, int8; choose one of them"),
        ("fp32", torch.bfloat16, r"head \(fp32\) must be auto, bf16, or int8 where the model itself is in bf16, .*"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(head, dtype, message):
    with pytest.raises(ConfigError, match=message):
        check_head(head, dtype)
    with pytest.raises(ConfigError, match=message):
        use_weights(model(dtype or torch.float32), "auto", head)
    for fits in ("auto", "bf16", "int8"):
        check_head(fits, torch.bfloat16)
