"""Decoding token by token equals whole sequences at once: every kind of model, different lengths, sliding caches."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.inference.cached_model import prefill
from qsparse_moe.inference.engine import ENGINES, EngineSpec, resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache, cache_bytes
from qsparse_moe.moe.backends.registry import BACKENDS
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.inference.models import all_at_once, config, model, plan_per_expert, random_tokens, sliding_window

torch.set_num_threads(1)
CPU = torch.device("cpu")
PROMPTS = (5, 9, 1)
"""Tokens that are computed at once; the rest of 16 comes one by one."""
LENGTH = 16

DENSE = {
    "plain": {},
    "grouped-query attention": {"num_kv_heads": 2},
    "norms of queries and keys": {"qk_norm": True, "head_size": 8},
    "frequencies and queries scaled by yarn": {
        "rope_scaling": {"type": "yarn", "factor": 6.0, "original_length": 20, "beta_fast": 2.0, "beta_slow": 0.5}
    },
    "norms over all heads": {"qk_norm": "all_heads", "num_kv_heads": 2, "head_size": 10},
    "biases of queries, keys and values": {"attention_bias": "qkv", "num_kv_heads": 2},
    "all biases": {"attention_bias": "all", "qk_norm": "all_heads", "num_kv_heads": 1},
    "scaled frequencies": {
        "rope_scaling": {"type": "llama3", "factor": 8.0, "original_length": 50, "high_frequency_factor": 2.0}
    },
    "tied embeddings": {"tie_embeddings": True},
    "shared experts": {"moe": {"num_shared_experts": 1, "shared_expert_gate": True}},
    "a dense layer": {"moe": {"num_dense_layers": 1}},
    "groups of experts": {"moe": {"num_expert_groups": 2, "router": "sigmoid_topk", "bias_update_rate": 0.1}},
    "a capacity in training": {"moe": {"capacity_factor": 0.5}},
    **{
        f"activation {name}": {"moe": {"activation": name}}
        for name in ("swiglu", "relu2glu", "reglu", "drelu", "relu2")
    },
    **{
        f"router {name}": {"moe": {"router": name}}
        for name in ("softmax_topk", "topk_softmax", "sigmoid_topk", "sigmoid_topk_renormalized")
    },
    **{
        f"experts by {spec.name}": {"moe": {"backend": spec.name}}
        for spec in BACKENDS
        if spec.why_not(config(), CPU) is None
    },
}
SPARSE = {
    "top-k": {"sparsity": {"default": 0.5}},
    "top-k, compiled": {"sparsity": {"default": 0.5, "backend": "native"}},
    "blocks": {"sparsity": {"default": 0.5, "selection": "block", "group_size": 8}},
    "statistical": {"sparsity": {"default": 0.5, "selection": "statistical"}},
    "relu": {"sparsity": {"default": 0.5, "selection": "relu", "gradient": "masked"}},
    "rescaled to one": {"sparsity": {"default": 0.5, "rescale": "unit"}},
    "rescaled to what it was": {"sparsity": {"default": 0.5, "rescale": "preserve"}},
    "int8 and ternary": {"sparsity": {"default": 0.5, "quantization": {"activations": "int8", "weights": "ternary"}}},
    "a router of sparse tokens": {"sparsity": {"default": 0.5}, "moe": {"router_input": "sparse"}},
    "shared and dense": {"sparsity": {"default": 0.5}, "moe": {"num_shared_experts": 1, "num_dense_layers": 1}},
}


def token_by_token(built, tokens_BS, prompts=PROMPTS, engine="torch", **cache_settings):
    """The logits from the last token of each prompt on, and where they belong in ``(B, S)``."""
    weight = built.embedding.weight
    cache = KeyValueCache.allocate(
        built.config, **{"batch": len(tokens_BS), "capacity": LENGTH, "dtype": weight.dtype} | cache_settings
    )
    decode = resolve_engine(engine, built).decode
    rows = torch.arange(len(tokens_BS))
    last = torch.tensor(prompts) - 1
    logits = [prefill(built, [row[:n].tolist() for row, n in zip(tokens_BS, prompts, strict=True)], cache)]
    for step in range(1, tokens_BS.shape[1] - max(prompts) + 1):
        logits.append(decode(tokens_BS[rows, last + step], cache))
    return torch.stack(logits, 1), rows[:, None], last[:, None] + torch.arange(len(logits))


def largest_difference(built, tokens_BS, expected_BSV, **settings):
    found, rows, places = token_by_token(built, tokens_BS, **settings)
    return (found - expected_BSV[rows, places]).abs().max().item()


# Triton's interpreter takes its time: test_triton_engine.py compares that engine with torch, in fewer steps.
@pytest.mark.parametrize("engine", [spec.name for spec in ENGINES if spec.name != "triton"])
@pytest.mark.parametrize("settings", DENSE.values(), ids=DENSE.keys())
def test_token_by_token_equals_all_at_once(settings, engine):
    built = model(**settings)
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(built, tokens)
    assert expected.std() > 0.5, "logits that hardly differ prove nothing"
    assert largest_difference(built, tokens, expected, engine=engine) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("settings", SPARSE.values(), ids=SPARSE.keys())
def test_sparse_sites_select_the_same_token_by_token(settings):
    # In float64 no near tie is decided by rounding.
    built = model(torch.float64, **settings)
    tokens = random_tokens(3, LENGTH)
    assert largest_difference(built, tokens, all_at_once(built, tokens)) < 1e-5


@pytest.mark.parametrize("selection", ["topk", "block", "threshold"])
def test_plans_with_an_s_per_expert_apply_token_by_token(selection):
    built = model(torch.float64, sparsity={"selection": selection, "group_size": 8})
    built.set_sparsity(plan_per_expert(built, selection))
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(built, tokens)
    assert largest_difference(built, tokens, expected) < 1e-5
    built.set_sparsity(SparsityPlan.uniform(built.config, 0.0))
    assert (all_at_once(built, tokens) - expected).abs().max() > 0.1, "the plan changes the logits"


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, SPARSE["shared and dense"]], ids=["dense", "sparse"])
def test_token_by_token_equals_all_at_once_on_a_gpu(settings):
    built = model(torch.float64, **settings).cuda()
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(built, tokens.cuda()).cpu()
    found, rows, places = token_by_token(built, tokens, device="cuda")
    assert (
        found.device.type == "cuda" and (found.cpu() - expected[rows, places]).abs().max() < 1e-5 * expected.abs().max()
    )


def test_bf16_differs_by_rounding_alone():
    built = model(torch.bfloat16)
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(model(), tokens)
    rounding = (all_at_once(built, tokens) - expected).abs().max().item()
    assert largest_difference(built, tokens, expected) < 2 * rounding


def test_hidden_ids_have_no_probability():
    built = model()
    built.hide_ids((257, 258))
    found, _, _ = token_by_token(built, random_tokens(3, LENGTH))
    assert (found[..., 257:259] == -torch.inf).all() and found[..., :257].isfinite().all()


@pytest.mark.parametrize("capacity", [1, 3, 7])
@pytest.mark.parametrize("prompts", [(5, 9, 1), (2, 2, 2)])
def test_a_full_ring_slides(capacity, prompts):
    built = model()
    tokens = random_tokens(3, LENGTH)
    expected = sliding_window(built, tokens, capacity)
    found = largest_difference(built, tokens, expected, prompts=prompts, capacity=capacity, slides=True)
    assert found < 1e-5 * expected.abs().max()
    assert (expected - all_at_once(built, tokens))[:, capacity:].abs().max() > 0.1


def test_a_cache_that_is_not_full_drops_no_token():
    built = model()
    tokens = random_tokens(3, LENGTH)
    expected = all_at_once(built, tokens)
    assert largest_difference(built, tokens, expected, capacity=40, slides=True) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("capacity", [LENGTH, 6])
def test_a_prefill_continues_from_the_tokens_in_the_cache(capacity):
    built = model()
    tokens = random_tokens(2, LENGTH)
    expected = sliding_window(built, tokens, capacity)
    cache = KeyValueCache.allocate(built.config, batch=2, capacity=capacity, dtype=torch.float32, slides=True)
    places = [0, 0]
    for lengths in [(3, 1), (1, 1), (5, 9), (4, 2)]:
        parts = [tokens[row, places[row] : places[row] + n].tolist() for row, n in enumerate(lengths)]
        logits = prefill(built, parts, cache)
        places = [place + n for place, n in zip(places, lengths, strict=True)]
        assert cache.positions_B.tolist() == places
        for row, place in enumerate(places):
            assert (logits[row] - expected[row, place - 1]).abs().max() < 1e-5 * expected.abs().max()


def test_sequences_that_ended_are_dropped_and_the_others_continue():
    built = model()
    tokens = random_tokens(4, LENGTH)
    expected = all_at_once(built, tokens)
    cache = KeyValueCache.allocate(built.config, batch=4, capacity=LENGTH, dtype=torch.float32)
    prefill(built, [row[:n].tolist() for row, n in zip(tokens, (2, 3, 4, 5), strict=True)], cache)
    cache.keep([1, 3])
    decode = resolve_engine("torch", built).decode
    for step in range(4):
        logits = decode(tokens[[1, 3], [3 + step, 5 + step]], cache)
        assert (logits - expected[[1, 3], [3 + step, 5 + step]]).abs().max() < 1e-5 * expected.abs().max()
    cache.keep([1])
    assert (decode(tokens[[3], [9]], cache) - expected[[3], [9]]).abs().max() < 1e-5 * expected.abs().max()


def test_a_full_cache_refuses_the_next_token_and_changes_nothing():
    built = model()
    cache = KeyValueCache.allocate(built.config, batch=2, capacity=4, dtype=torch.float32)
    prefill(built, [[1, 2, 3, 4], [1]], cache)
    before = cache.key_LBHPC.clone()
    with pytest.raises(
        ConfigError, match=r"holds 4 tokens per sequence, and a sequence has 5; .*max_length, or let it"
    ):
        resolve_engine("torch", built).decode(torch.tensor([5, 5]), cache)
    assert cache.positions_B.tolist() == [4, 1] and torch.equal(cache.key_LBHPC, before)


def test_the_cache_is_as_large_as_the_accounting_says():
    settings = config(num_kv_heads=2)
    cache = KeyValueCache.allocate(settings, batch=3, capacity=5, dtype=torch.bfloat16)
    assert cache.num_bytes == cache_bytes(settings, batch=3, capacity=5, dtype=torch.bfloat16) == 2 * 2 * 3 * 2 * 5 * 32
    assert (cache.batch, cache.capacity) == (3, 5)


def test_a_cache_is_refused_in_training():
    built = model().train()
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=4, dtype=torch.float32)
    with pytest.raises(AssertionError, match="evaluation mode"):
        prefill(built, [[1, 2]], cache)


def test_an_engine_is_chosen_once_and_logged(caplog):
    built = model()
    broken = EngineSpec("broken", lambda model: "it has no compiler; install one", lambda model, requested: None)
    with caplog.at_level("INFO"):
        assert resolve_engine("auto", built, engines=(broken, *ENGINES)).name == ENGINES[0].name
    assert "engine=auto: using" in caplog.text and "not broken: it has no compiler" in caplog.text
    with pytest.raises(BackendUnavailable, match=r"engine \('broken'\) cannot run here: broken: it has no compiler"):
        resolve_engine("broken", built, engines=(broken, *ENGINES))
    with pytest.raises(BackendUnavailable, match=r"engine \('fast'\) must be one of auto, .*torch, triton; choose one"):
        resolve_engine("fast", built)
