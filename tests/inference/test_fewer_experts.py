"""Every decode engine under a plan with fewer experts per token: its logits, and what it reads."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.inference.cached_model import TorchDecode, prefill
from qsparse_moe.inference.gather_engine import GatherDecode
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.native import NativeDecode
from qsparse_moe.inference.triton_engine import TritonDecode
from qsparse_moe.kernels import native, tiles
from qsparse_moe.sparsity.plan import SparsityPlan
from tests.inference.models import all_at_once, difference_from_torch, model, random_tokens

MOE = {"num_experts": 6, "experts_per_token": 4, "activation": "swiglu"}
# Experts per token and share of the weight by layer.
ROUTINGS = {
    "two and none": ({0: 2, 1: 0}, {}),
    "shares": ({1: 3}, {0: 0.5, 1: 0.7}),
    "a share of two": ({0: 2}, {0: 0.4}),
}
# Each with weights of another kind.
MODELS = {
    "router": {"router": "topk_softmax", "num_shared_experts": 1},
    "kept": {"router": "softmax_topk_renormalized", "fewer_experts_weights": "kept"},
    "renormalized": {"router": "sigmoid_topk", "fewer_experts_weights": "renormalized", "num_shared_experts": 1},
    "groups and biases": {
        "router": "sigmoid_topk_renormalized", "bias_update_rate": 0.1, "num_expert_groups": 3, "groups_per_token": 2,
        "router_scaling_factor": 2.5,
    },
}  # fmt: skip
ENGINES = {"native": NativeDecode, "gather": GatherDecode, "triton": TritonDecode}


@pytest.fixture(scope="module")
def models():
    built = {name: model(moe=MOE | moe, sparsity={"default": 0.25}) for name, moe in MODELS.items()}
    for router in built["groups and biases"].routers():
        router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 6).roll(2))
    return built


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def use(built, routing, **plan):
    experts, top_p = ROUTINGS[routing]
    whole = SparsityPlan.from_config(built.config) if not plan else SparsityPlan.uniform(built.config, **plan)
    built.set_sparsity(whole.with_experts(experts).with_top_p(top_p))
    return built


def skip_unless_possible(name):
    reason = {"native": native.why_not, "triton": tiles.why_not}.get(name, lambda device: None)(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("weights", MODELS)
@pytest.mark.parametrize(("name", "threads"), [("native", 1), ("native", 2), ("gather", 1)], indirect=["threads"])
def test_logits_are_those_of_the_training_model(models, name, weights, routing, threads):
    skip_unless_possible(name)
    built = use(models[weights], routing)
    # Ten tokens of one step: more than one group of eight that share a pass over an expert.
    prompts = (4, 2, 7, *range(1, 8))
    assert difference_from_torch(built, ENGINES[name](built), prompts, capacity=9, steps=3) < 2e-5


@pytest.mark.parametrize(("weights", "routing"), [("router", "two and none"), ("kept", "shares")])
def test_logits_under_triton_are_those_of_the_training_model(models, weights, routing):
    skip_unless_possible("triton")
    built = use(models[weights], routing)
    assert difference_from_torch(built, TritonDecode(built), (5, 2), capacity=6, steps=2) < 1e-5


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_cached_step_is_that_of_the_whole_sequence(models, routing):
    built = use(models["renormalized"], routing)
    tokens = random_tokens(2, 8)
    cache = KeyValueCache.allocate(built.config, batch=2, capacity=8, dtype=torch.float32)
    found = [prefill(built, tokens[:, :5].tolist(), cache)]
    found += [TorchDecode(built).decode(tokens[:, step], cache) for step in (5, 6, 7)]
    torch.testing.assert_close(torch.stack(found, 1), all_at_once(built, tokens)[:, 4:], atol=1e-4, rtol=1e-4)


def step_of(engine, built):
    """Decode one token of a sequence, and return the experts that each layer used for it."""
    cache = KeyValueCache.allocate(built.config, batch=1, capacity=4, dtype=torch.float32)
    prefill(built, [[3, 7]], cache)
    other = KeyValueCache.allocate(built.config, batch=1, capacity=4, dtype=torch.float32)
    prefill(built, [[3, 7]], other)
    engine.decode(torch.tensor([11]), cache)
    seen = []
    for router in built.routers():
        router.hook = seen.append
    TorchDecode(built).decode(torch.tensor([11]), other)
    for router in built.routers():
        router.hook = None
    return [int((ids >= 0).sum()) for ids in seen]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_native_engine_reads_the_experts_in_use_alone(models, routing):
    skip_unless_possible("native")
    built = models["kept"]
    built.set_sparsity(SparsityPlan.uniform(built.config, 0.0))
    dense = NativeDecode(built, gate_first=False)
    assert step_of(dense, built) == [4, 4]
    fewer = dense.with_plan_of(use(built, routing, sparsity=0.0))
    used = step_of(fewer, built)
    assert used[1] < 4 or used[0] < 4
    # Gate, up, and down of an expert, with 4 bytes per weight.
    assert dense.bytes_read - fewer.bytes_read == (8 - sum(used)) * 3 * 64 * 32 * 4


def test_lists_of_experts_that_are_not_used_are_empty(models, monkeypatch):
    built = use(models["kept"], "shares", sparsity=0.0)
    engine = GatherDecode(built)
    listed = []
    original = engine._weights.list_features

    def list_features(rows_ND, capacity, *, with_zeros):
        lists = original(rows_ND, capacity, with_zeros=with_zeros)
        listed.append((rows_ND != 0).any(-1))
        return lists

    monkeypatch.setattr(engine._weights, "list_features", list_features)
    used = step_of(engine, built)
    # Of each layer: attention's input and output, the experts' input, and their hidden features.
    assert [int(rows.sum()) for rows in listed] == [1, 1, used[0], used[0], 1, 1, used[1], used[1]]
    assert [len(rows) for rows in listed[2::4]] == [4, 3]
