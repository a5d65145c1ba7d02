"""Generation with latent attention: one vector per token in the cache, and the same logits from every engine."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.inference.cached_model import prefill
from qsparse_moe.inference.engine import prepare_prefill, resolve_engine
from qsparse_moe.inference.gather_engine import GatherDecode
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.memory import MemoryDtypes, prefill_bytes
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.inference.prompt_cache import PromptCache
from qsparse_moe.inference.triton_engine import TritonDecode
from qsparse_moe.inference.weights import use_bf16_products, use_weights
from qsparse_moe.kernels import native, tiles
from tests.inference.models import all_at_once, config, difference_from_torch, model, random_tokens, sliding_window
from tests.inference.test_cached_model import LENGTH, largest_difference
from tests.inference.test_prompt_cache import TURNS, made, talk

torch.set_num_threads(1)
NEEDS_COMPILER = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason="needs a C++ compiler and ninja"
)
LATENT = {"key_value_rank": 24, "nope_head_size": 10, "rope_head_size": 6, "value_head_size": 12}
RANKED = LATENT | {"query_rank": 20}
CASES = {
    "queries from the input": {"latent_attention": LATENT},
    "queries from a vector": {"latent_attention": RANKED},
    "yarn": {
        "latent_attention": RANKED | {"rope_head_size": 8},
        "rope_scaling": {"type": "yarn", "factor": 6.0, "original_length": 20, "beta_fast": 2.0, "score_factor": 1.4},
    },
    "wide values and shared experts": {
        "latent_attention": LATENT | {"value_head_size": 20},
        "moe": {"num_shared_experts": 1},
    },
}
SPARSE = {
    "top-k": {"sparsity": {"default": 0.5}},
    "statistical": {"sparsity": {"default": 0.5, "selection": "statistical"}},
    "int8 and ternary": {"sparsity": {"default": 0.5, "quantization": {"activations": "int8", "weights": "ternary"}}},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_token_by_token_equals_all_at_once(settings):
    built = model(**settings)
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(built, tokens)
    assert expected.std() > 0.5, "logits that hardly differ prove nothing"
    assert largest_difference(built, tokens, expected) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("settings", SPARSE.values(), ids=SPARSE.keys())
def test_sparse_sites_select_the_same_token_by_token(settings):
    # In float64 no near tie is decided by rounding.
    built = model(torch.float64, latent_attention=RANKED, **settings)
    tokens = random_tokens(3, LENGTH)
    assert largest_difference(built, tokens, all_at_once(built, tokens)) < 1e-5


def test_bf16_differs_by_rounding_alone():
    built = model(torch.bfloat16, latent_attention=RANKED)
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(model(latent_attention=RANKED), tokens)
    rounding = (all_at_once(built, tokens) - expected).abs().max().item()
    assert largest_difference(built, tokens, expected) < 2 * rounding


@pytest.mark.parametrize("capacity", [1, 3, 7])
def test_a_full_ring_slides_and_a_prefill_continues_in_it(capacity):
    built = model(latent_attention=RANKED)
    tokens = random_tokens(3, LENGTH)
    expected = sliding_window(built, tokens, capacity)
    assert (expected - all_at_once(built, tokens))[:, capacity:].abs().max() > 0.1
    found = largest_difference(built, tokens, expected, capacity=capacity, slides=True)
    assert found < 1e-5 * expected.abs().max()
    cache = KeyValueCache.allocate(built.config, batch=2, capacity=capacity, dtype=torch.float32, slides=True)
    places = [0, 0]
    for lengths in [(3, 1), (1, 1), (5, 9), (4, 2)]:
        parts = [tokens[row, places[row] : places[row] + n].tolist() for row, n in enumerate(lengths)]
        logits = prefill(built, parts, cache)
        places = [place + n for place, n in zip(places, lengths, strict=True)]
        for row, place in enumerate(places):
            assert (logits[row] - expected[row, place - 1]).abs().max() < 1e-5 * expected.abs().max()


def test_the_cache_holds_one_vector_and_one_rotated_key_per_token_also_when_sequences_end():
    built = model(latent_attention=RANKED)
    cache = KeyValueCache.allocate(built.config, batch=3, capacity=LENGTH, dtype=torch.float32)
    assert (cache.key_LBHPC.shape, cache.value_LBHPC.shape) == ((2, 3, 1, LENGTH, 30), (2, 3, 1, LENGTH, 0))
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(built, tokens)
    prefill(built, [row[:n].tolist() for row, n in zip(tokens, (2, 3, 4), strict=True)], cache)
    # The vector is stored after its norm and the key after its rotation: the first position turns nothing.
    with torch.no_grad():
        layer = built.layers[0]
        down = layer.attention.down(layer.attention_norm(built.embedding(tokens[0, :1])))
        want = torch.cat((layer.attention.latent_norm(down[:, 20:44]), down[:, 44:]), -1)
    torch.testing.assert_close(cache.key_LBHPC[0, 0, 0, :1], want)
    cache.keep([0, 2])
    logits = resolve_engine("torch", built).decode(tokens[[0, 2], [2, 4]], cache)
    assert (logits - expected[[0, 2], [2, 4]]).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("engine", ["torch", "gather", pytest.param("native", marks=NEEDS_COMPILER)])
def test_a_conversation_keeps_its_vectors(engine):
    generator = made(engine, latent_attention=RANKED)
    assert talk(generator, TURNS, PromptCache()) == talk(generator, TURNS, None)


SITES = {
    "dense": {},
    "top-k": {"sparsity": {"default": 0.5}, "moe": {"num_shared_experts": 1, "num_dense_layers": 1}},
    "block, rescaled": {"sparsity": {"default": 0.5, "selection": "block", "group_size": 8, "rescale": "preserve"}},
    "ternary": SPARSE["int8 and ternary"],
}


ENGINES_WITH_ROWS = [
    pytest.param(NativeDecode, marks=NEEDS_COMPILER),
    GatherDecode,
]


@pytest.mark.parametrize("settings", (SITES | CASES).values(), ids=(SITES | CASES).keys())
@pytest.mark.parametrize("latent", [LATENT, RANKED], ids=["queries from the input", "queries from a vector"])
@pytest.mark.parametrize("engine", ENGINES_WITH_ROWS)
def test_rows_of_nonzero_features_give_the_logits_of_the_training_model(settings, latent, engine):
    built = model(**{"latent_attention": latent} | settings)
    assert difference_from_torch(built, engine(built), (4, 2, 7), capacity=9, steps=10) < 1e-5


@NEEDS_COMPILER
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_native_engine_shares_the_heads_among_its_threads(threads):
    built = model(latent_attention=RANKED, num_heads=5, sparsity={"default": 0.5})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert difference_from_torch(built, NativeDecode(built), (4, 2), capacity=9, steps=6) < 1e-5
    finally:
        torch.set_num_threads(before)


@NEEDS_COMPILER
@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_the_native_engine_reads_the_inner_matrices_whole_and_counts_them(weights):
    # Dense, because the reference rounds to bf16, which a near tie of a selection would show.
    built = model(latent_attention=RANKED)
    use_weights(built, weights)
    engine = NativeDecode(built, weights, by_integers=False)
    bound = 1e-5 if weights == "int8" else 0.05
    assert difference_from_torch(built, engine, (4, 2), capacity=9, steps=5) < bound
    # Per layer 4 heads of 16 channels from 20 and of 22 from 24, in fp32 whatever the format of the others is.
    inner = 2 * 4 * 4 * (16 * 20 + 22 * 24)
    attention_alone = NativeDecode(model(latent_attention=RANKED), "fp32").figures()
    assert engine.figures()["bytes_read"] > inner and engine._inner_bytes == inner
    assert attention_alone["weight_bytes"] > engine.figures()["weight_bytes"] > inner


@NEEDS_COMPILER
def test_auto_takes_the_native_engine():
    assert resolve_engine("auto", model(latent_attention=RANKED)).name == "native"


def test_gathered_rows_of_int8_weights_and_a_bf16_model():
    rounded = model(latent_attention=RANKED, sparsity={"default": 0.5})
    use_weights(rounded, "int8")
    assert difference_from_torch(rounded, GatherDecode(rounded, "int8"), (4, 2), capacity=9, steps=5) < 1e-5
    half = model(torch.bfloat16, latent_attention=RANKED)
    # The reference rounds its activations as well.
    assert difference_from_torch(half, GatherDecode(half), (4, 2), capacity=9, steps=5) < 0.05


def test_inner_matrices_are_not_copied():
    built = model(latent_attention=RANKED)
    names = GatherDecode(built)._weights._stacks
    assert "layers.0.attention.down.weight" in names and not any("_up.weight" in name for name in names)


@pytest.mark.skipif(tiles.why_not(torch.device("cpu")) is not None, reason="needs Triton and its interpreter")
def test_triton_kernels_give_the_logits_of_the_training_model():
    built = model(latent_attention=RANKED, sparsity={"default": 0.5}, num_layers=1)
    assert difference_from_torch(built, TritonDecode(built), (3, 2), capacity=6, steps=2) < 1e-5


@pytest.mark.parametrize(("weights", "sparsity"), [("int8", {}), ("bf16", {}), ("ternary", SPARSE["int8 and ternary"])])
def test_number_formats_of_weights_are_those_of_prefill_and_decode(weights, sparsity):
    built = model(latent_attention=RANKED, **sparsity)
    before = built.layers[0].attention.latent_up.weight.clone()
    formats = use_weights(built, weights)
    prepare_prefill(built, resolve_engine("torch", built), formats.weights)
    assert not before.equal(built.layers[0].attention.latent_up.weight.float())
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(built, tokens)
    bound = 0.05 if weights == "bf16" else 1e-5
    assert largest_difference(built, tokens, expected) < bound * expected.abs().max()


def test_the_memory_estimate_counts_heads_that_are_wider_than_the_model():
    fp32 = MemoryDtypes(torch.float32, torch.float32, torch.float32)
    ordinary, latent = (
        prefill_bytes(config(**more), num_tokens=7, dtypes=fp32) for more in ({}, CASES["queries from a vector"])
    )
    assert latent - ordinary == 7 * 4 * 4 * (4 * 16 + 10 + 12)


def test_bf16_products_leave_the_inner_matrices_in_fp32():
    """Decoding uses them too, in every engine, and no code of int8 weights stands for them."""
    built = model(latent_attention=RANKED)
    use_bf16_products(built)
    types = {name: parameter.dtype for name, parameter in built.layers[0].attention.named_parameters()}
    assert types["down.weight"] == types["output.weight"] == torch.bfloat16
    assert types["query_up.weight"] == types["latent_up.weight"] == torch.float32
