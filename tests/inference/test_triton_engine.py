"""The Triton engine computes what the training model's own parts compute; under the interpreter, and on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.inference import triton_engine
from qsparse_moe.inference.cached_model import TorchDecode
from qsparse_moe.inference.engine import resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.listed_model import most_selected
from qsparse_moe.inference.triton_engine import TritonDecode, why_not
from qsparse_moe.inference.weights import round_weights
from qsparse_moe.kernels import tiles
from qsparse_moe.nn.hooks import site_hooks
from tests.inference.models import difference_from_torch, model, plan_per_expert
from tests.inference.test_cached_model import DENSE, SPARSE

interpreted = pytest.mark.skipif(
    tiles.why_not(torch.device("cpu")) is not None, reason="needs Triton and its interpreter"
)
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
# One of each kind whose parts are those of the training model: routers and activations.
OF_OTHERS = (
    "router softmax_topk",
    "router topk_softmax",
    "router sigmoid_topk",
    "a capacity in training",
    "activation relu2glu",
    "activation reglu",
    "top-k, compiled",
)
SETTINGS = {
    name: settings
    for name, settings in (DENSE | SPARSE).items()
    if name not in OF_OTHERS and not name.startswith("experts by")
}


def largest_difference(built, device="cpu", weight_format=None, prompts=(5, 2), capacity=6, steps=2, **settings):
    """The first sequence slides in the second step."""
    built = built.to(device)
    engine = TritonDecode(built, weight_format, **settings)
    return difference_from_torch(built, engine, prompts, capacity=capacity, steps=steps)


@on_devices
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_triton_logits_are_those_of_the_training_model(device, settings):
    assert largest_difference(model(**settings), device) < 1e-5


@on_devices
@pytest.mark.parametrize("selection", ["topk", "block", "threshold"])
def test_experts_with_their_own_s_select_separately(device, selection):
    built = model(sparsity={"selection": selection, "group_size": 8})
    built.set_sparsity(plan_per_expert(built, selection))
    assert largest_difference(built, device) < 1e-5


@on_devices
@pytest.mark.parametrize("batch", [1, 5])
def test_odd_sizes_and_every_batch_size_match_the_training_model(device, batch):
    built = model(hidden_size=72, num_heads=2, sparsity={"default": 0.6}, moe={"expert_hidden_size": 37})
    assert largest_difference(built, device, prompts=tuple(range(1, batch + 1)), capacity=20) < 1e-5


@on_devices
@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8"])
def test_weights_in_a_number_format_are_those_of_the_rounded_model(device, weight_format):
    built = model(sparsity={"default": 0.5})
    if weight_format == "bf16":
        built = built.bfloat16().float()
    round_weights(built, weight_format)
    assert largest_difference(built, device, weight_format) < 1e-5


@on_devices
def test_a_bf16_model_is_computed_in_fp32_from_its_weights(device):
    # Its head is stored input-major; nothing but the weights is rounded.
    rounded = model(torch.bfloat16).to(device)
    exact = model().bfloat16().float().to(device)
    found = [step(TritonDecode(built), built) for built in (rounded, exact)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@on_devices
def test_reading_every_row_changes_no_logit(device):
    built = model(sparsity={"default": 0.5}, moe={"num_shared_experts": 1})
    assert largest_difference(built, device, rows="all") < 1e-5
    assert [TritonDecode(built, rows=rows).figures()["rows"] for rows in ("auto", "selected", "all")] == [
        "selected",
        "selected",
        "all",
    ]


def step(engine, built, tokens=(3, 1, 200), capacity=4):
    """The logits of one step from an empty cache."""
    return engine.decode(torch.tensor(tokens), cache_for(built, batch=len(tokens), capacity=capacity)).cpu()


def cache_for(built, **sizes):
    device = built.head.weight.device
    return KeyValueCache.allocate(built.config, dtype=torch.float32, device=device, **sizes)


@on_devices
def test_ids_that_the_model_hides_have_no_probability(device):
    built = model().to(device)
    built.hide_ids([260, 261])
    logits_BV = step(TritonDecode(built), built)
    assert logits_BV[:, 260:262].isneginf().all() and logits_BV[:, :260].isfinite().all()


@on_devices
def test_a_hook_at_a_site_is_called(device):
    built = model(sparsity={"default": 0.5}).to(device)
    plain, sites = step(TritonDecode(built), built), built.layers[0].sites()
    with site_hooks({site: lambda x, expert_N, rows: 2 * x for site in sites.values()}):
        engine = TritonDecode(built)
        assert not engine.captures_graphs
        assert [most_selected(site) for site in sites.values()] == [site.num_features for site in sites.values()]
        hooked = step(engine, built)
        expected = TorchDecode(built).decode(torch.tensor([3, 1, 200]), cache_for(built, batch=3, capacity=4)).cpu()
    torch.testing.assert_close(hooked, expected, rtol=1e-5, atol=1e-5)
    assert (hooked - plain).abs().max() > 0.1


class ReadsNoValue(TorchDispatchMode):
    """Raises where the host would wait for a value of a device, which a CUDA graph cannot."""

    waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount")

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        # A mask as an index is turned into places, whose number is a value.
        indices = arguments[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        assert name not in self.waits and not by_mask, f"{name} reads a value of the device"
        return function(*arguments, **(settings or {}))


@interpreted
@pytest.mark.parametrize("selection", ["topk", "block", "statistical"])
def test_no_value_is_read_by_the_host_in_a_step(selection):
    sparsity = {"default": 0.5, "selection": selection, "group_size": 8, "backend": "triton", "rescale": "unit"}
    built = model(num_layers=1, sparsity=sparsity, moe={"num_shared_experts": 1})
    engine, cache = TritonDecode(built), cache_for(built, batch=2, capacity=4)
    tokens_B, positions_B = torch.tensor([1, 2]), torch.tensor([0, 0])
    with torch.no_grad(), ReadsNoValue():
        for waits in (lambda: tokens_B[tokens_B > 1], lambda: tokens_B.sum().item()):
            with pytest.raises(AssertionError, match="reads a value of the device"):
                waits()
        engine._step(tokens_B, positions_B, cache)


class StandInGraph:
    """Computes a step from the tensors that were captured, as a CUDA graph does."""

    def __init__(self, engine, cache, tokens_B, positions_B):
        self.memory = (engine, copy.copy(cache), tokens_B, positions_B)
        self.logits_BV = torch.empty(len(tokens_B), engine._model._model.head.weight.shape[0])

    def replay(self):
        engine, cache, tokens_B, positions_B = self.memory
        self.logits_BV.copy_(engine._step(tokens_B, positions_B, cache))


@interpreted
def test_a_graph_is_replayed_only_for_its_batch_and_its_cache(monkeypatch):
    built, captured = model(num_layers=1), []

    def capture(engine, tokens_B, cache):
        captured.append(cache.batch)
        tokens_B, positions_B = torch.zeros_like(tokens_B), torch.zeros_like(cache.positions_B)
        graph = StandInGraph(engine, cache, tokens_B, positions_B)
        return triton_engine._CapturedStep(
            graph, triton_engine._memory_of(cache), tokens_B, positions_B, graph.logits_BV
        )

    monkeypatch.setattr(TritonDecode, "_capture", capture)
    replaying, plain = TritonDecode(built), TritonDecode(built)
    replaying.captures_graphs = True
    caches, kept = [cache_for(built, batch=2, capacity=4) for _ in range(2)], []
    for token in (3, 9):
        tokens_B = torch.tensor([token, 7])
        found, expected = (e.decode(tokens_B, c) for e, c in zip((replaying, plain), caches, strict=True))
        kept.append((found, expected))
    assert captured == [2] and all(torch.equal(*pair) for pair in kept)
    for cache in caches:
        cache.keep([1])
    assert torch.equal(*(e.decode(tokens_B[:1], c) for e, c in zip((replaying, plain), caches, strict=True)))
    other = cache_for(built, batch=2, capacity=3)
    replaying.decode(tokens_B, other)
    replaying.decode(tokens_B, other)
    assert captured == [2, 1, 2] and replaying.figures()["cuda_graphs"] == 2


@interpreted
def test_a_full_cache_is_refused_before_a_step():
    built = model()
    engine, cache = TritonDecode(built), cache_for(built, batch=1, capacity=1)
    engine.decode(torch.tensor([7]), cache)
    with pytest.raises(ConfigError, match=r"holds 1 tokens per sequence, and a sequence has 2.*max_length"):
        engine.decode(torch.tensor([7]), cache)


@interpreted
def test_bytes_of_ternary_weights_are_counted_by_hand():
    built = model(sparsity={"quantization": {"weights": "ternary"}}, hidden_size=256, moe={"expert_hidden_size": 256})
    layer = (256 * 768 + 256 * 256 + 4 * 3 * 256 * 256) // 4 + 4 * (2 + 4 * 3)
    figures = TritonDecode(built).figures()
    assert figures["weight_bytes"] == 2 * layer + built.head.weight.nbytes
    assert figures["weights"] == "ternary" and figures["cuda_graphs"] == 0


def test_lists_have_as_many_entries_as_the_site_selects_at_most():
    site = model(sparsity={"default": 0.75}).layers[0].moe.input_site
    assert most_selected(site) == 16
    site.set_sparsity([0.75, 0.5, 0.75, 0.75])
    assert most_selected(site) == 32
    assert most_selected(model(sparsity={"default": 0.75, "selection": "statistical"}).layers[0].moe.input_site) == 64


def test_unsupported_models_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "run on CUDA devices, the device is cpu" in why_not(model())
    assert why_not(model()).endswith("the engine torch runs on every device")
    with pytest.raises(BackendUnavailable, match="engine \\('triton'\\) cannot run here"):
        resolve_engine("triton", model())
    monkeypatch.setattr(triton_engine.tiles, "why_not", lambda device: None)
    assert why_not(model()) is None
    assert why_not(model(torch.float64)).endswith("the model is in torch.float64; use the engine torch")
    monkeypatch.setattr(triton_engine.tiles, "MAX_FEATURES", 63)
    assert why_not(model()).endswith("hold at most 63 features, and a site has 64; use the engine torch")


def test_the_triton_engine_is_chosen_only_by_name(monkeypatch):
    monkeypatch.setattr(triton_engine.tiles, "why_not", lambda device: None)
    assert resolve_engine("auto", model(torch.float64)).name == "torch"
    assert resolve_engine("auto", model(moe={"force_uniform_routing": True})).name == "torch"
    assert resolve_engine("triton", model()).name == "triton"


@pytest.mark.gpu
def test_a_replayed_graph_gives_the_logits_of_a_separate_step():
    built = model(sparsity={"default": 0.5}, moe={"num_shared_experts": 1}).cuda()
    captured, plain = TritonDecode(built), TritonDecode(built, capture_graphs=False)
    assert captured.captures_graphs and not plain.captures_graphs
    for batch, capacity in ((1, 8), (3, 8), (3, 5), (1, 8)):
        caches = [cache_for(built, batch=batch, capacity=capacity, slides=True) for _ in range(2)]
        for token in range(capacity + 2):
            tokens_B = torch.arange(batch) + token
            found = [e.decode(tokens_B, cache) for e, cache in zip((captured, plain), caches, strict=True)]
            # cuBLAS, which computes router and head, may choose another algorithm inside of a capture.
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(caches[0].key_LBHPC, caches[1].key_LBHPC, rtol=1e-5, atol=1e-5)
    assert captured.figures()["cuda_graphs"] == 2
