"""The MoE layer's benchmark: contenders that compute the same layer, and a result that reports all of them."""

from __future__ import annotations

import json
import time

import pytest
import torch

from qsparse_moe.bench import moe_layer, moe_text, routing
from qsparse_moe.bench.moe_layer import OUR_CHAIN, MoEBenchmark, build_contenders, make_weights, our_name
from qsparse_moe.bench.moe_peers import PEERS, LayerShape
from qsparse_moe.cli.app import run
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.moe.backends.registry import BACKENDS

SHAPE = LayerShape(tokens=24, hidden_size=16, expert_hidden_size=8, num_experts=4, experts_per_token=2)
CPU = torch.device("cpu")


def contenders(load, peers=PEERS, dtype=torch.float64):
    weights = make_weights(SHAPE, dtype, CPU)
    chosen = routing.choose_experts(load, SHAPE.tokens, SHAPE.num_experts, SHAPE.experts_per_token)
    x_TD = routing.routed_input(chosen, SHAPE.num_experts, SHAPE.hidden_size).to(dtype)
    return build_contenders(SHAPE, weights, x_TD, 0.5, peers)


def grads_by_name(contender, upstream):
    """Output, gradient of the input, and those of the weights: gates, ups and downs in the order of our names."""
    x = contender.x.clone().requires_grad_()
    y = contender.forward(x)[0]
    return y, torch.autograd.grad(y, (x, *contender.parameters), upstream.view_as(y))


@pytest.mark.slow
@pytest.mark.parametrize("load", routing.LOADS)
def test_every_layer_computes_the_same_from_the_same_weights(load):
    """fp32: PyTorch's grouped product takes no fp64."""
    ours, others, left_out = contenders(load, dtype=torch.float32)
    assert {"DeepSpeed", "transformers"} <= others.keys(), left_out
    upstream = torch.randn(SHAPE.tokens, SHAPE.hidden_size)
    y, (grad_x, *_) = grads_by_name(ours[our_name("loop")], upstream)
    dense = {name: contender for name, contender in ours.items() if "S 0.5" not in name}
    for name, contender in (dense | {peer: others[peer] for peer in ("DeepSpeed", "transformers")}).items():
        theirs, grads = grads_by_name(contender, upstream)
        torch.testing.assert_close(theirs.view_as(y), y, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(grads[0].view_as(grad_x), grad_x, rtol=1e-4, atol=1e-5, msg=name)
        assert len(grads) == 1 + len(contender.parameters)


def test_both_dense_chains_compute_one_expert_over_all_tokens():
    _, others, _ = contenders("balanced", {"dense": PEERS["dense"]}, torch.float32)
    upstream = torch.randn(SHAPE.rows, SHAPE.hidden_size)
    (y, grads), (ours, our_grads) = (grads_by_name(others[name], upstream) for name in ("dense", OUR_CHAIN))
    assert y.shape == (SHAPE.rows, SHAPE.hidden_size)
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(mine.view_as(theirs), theirs, rtol=1e-4, atol=1e-5)


def test_our_layer_applies_q_sparse_at_both_sites():
    ours, _, _ = contenders("balanced", {}, torch.float32)
    dense, sparse = (ours[our_name("loop", s)] for s in (0.0, 0.5))
    assert not torch.allclose(dense.forward(dense.x)[0], sparse.forward(sparse.x)[0], atol=1e-3)


def test_the_work_is_that_of_nine_products():
    assert SHAPE.rows == 48
    assert SHAPE.flops == 9 * 2 * 48 * 16 * 8


def a_peer_that_is_missing(shape, weights, x_TD):
    raise BackendUnavailable("it is not here")


def benchmark(**changed):
    settings = {"precisions": ("fp32",), "loads": ("skewed",), "sparsity": 0.5, "rounds": 2, "calls": 1, "device": CPU}
    return MoEBenchmark(SHAPE, **settings | changed)


@pytest.fixture
def small_peak(monkeypatch):
    monkeypatch.setattr(moe_layer, "PEAK_SIZE", {"cpu": 64})


@pytest.fixture
def result(small_peak):
    peers = {"dense": PEERS["dense"], "other": a_peer_that_is_missing}
    return moe_layer.run_moe_benchmark(benchmark(clock=time.process_time), peers)


def test_the_result_contains_every_contender_or_the_reason_for_leaving_it_out(result):
    (layer,) = result["layers"]
    assert layer["left_out"]["other"] == "it is not here"
    for backend in BACKENDS:
        assert (our_name(backend.name) in layer["seconds"]) != (our_name(backend.name) in layer["left_out"])
    assert layer["left_out"]["ours, megablocks"] == "timings under Triton's interpreter are meaningless"
    timed = layer["seconds"].keys()
    assert {"dense", OUR_CHAIN, our_name("loop"), our_name("loop", 0.5)} <= timed
    for by_contender in ("seconds_by_round", "flops_per_second", "share_of_peak", "peak_bytes"):
        assert layer[by_contender].keys() == timed
    assert all(len(rounds) == 2 for rounds in layer["seconds_by_round"].values())
    ratios = layer["times_as_fast_as"][our_name("loop", 0.5)]
    assert ratios.keys() == {"dense", OUR_CHAIN}
    assert ratios["dense"]["min"] <= ratios["dense"]["median"] <= ratios["dense"]["max"]


def test_the_result_names_machine_shape_loads_and_memory(result):
    (layer,) = result["layers"]
    assert result["machine"]["torch"] == torch.__version__
    assert result["shape"]["flops"] == SHAPE.flops
    assert (result["clock"], result["rounds"], result["sparsity"]) == ("processor", 2, 0.5)
    assert sum(layer["rows_per_expert"]) == SHAPE.rows
    assert layer["rows_per_expert"][0] > layer["rows_per_expert"][3]
    rate = layer["flops_per_second"]["dense"]
    assert layer["share_of_peak"]["dense"] == pytest.approx(rate / result["peak"]["fp32"])
    # The gradients of three (D, F) and of x are held at least.
    assert layer["peak_bytes"]["dense"] > 4 * (3 * 16 * 8 + SHAPE.rows * 16)


def test_the_profile_covers_the_backend_that_auto_chooses_with_and_without_q_sparse(result):
    (layer,) = result["layers"]
    first = moe_layer.fastest_first()[0].name
    assert list(layer["profile"]) == [our_name(first), our_name(first, 0.5), OUR_CHAIN]
    for profile in layer["profile"].values():
        assert profile["operators"][0]["share"] >= profile["operators"][-1]["share"]
    gathered = [copy for copy in layer["profile"][our_name(first)]["copies"] if copy["operator"] == "index_select"]
    assert [copy["bytes"] for copy in gathered] == [4 * SHAPE.rows * 16], "the rows are gathered once and never again"
    # The C++ operator reads the counts in place; the other backends on a CPU need them as a list.
    waits = [] if first == "native" else ["tolist"]
    assert [wait["operator"] for wait in layer["profile"][our_name(first)]["waits"]] == waits


def test_the_markdown_section_contains_the_figures_and_replaces_the_previous_one(result, tmp_path, capsys):
    page, file = tmp_path / "results.md", tmp_path / "moe.json"
    page.write_text(f"before\n{moe_text.BEGIN}\nold\n{moe_text.END}\nafter\n")
    file.write_text(json.dumps(result))
    moe_text.main([str(file), str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    (layer,) = result["layers"]
    assert f"{1e3 * layer['seconds']['dense']:.1f}" in text
    assert "24 tokens, D 16, F 8, E 4, A 2" in text
    assert "it is not here" in text
    assert "index_select" in text
    with pytest.raises(ValueError, match="add both lines to the file"):
        moe_text.with_section("no markers", result)
    with pytest.raises(SystemExit, match="usage"):
        moe_text.main([])


OPTIONS = {
    "--tokens": "24",
    "--hidden-size": "16",
    "--expert-hidden-size": "8",
    "--experts": "4",
    "--experts-per-token": "2",
    "--rounds": "1",
    "--precision": "fp32",
    "--load": "balanced",
    "--clock": "processor",
}


def test_the_verb_prints_a_table_and_writes_the_results(small_peak, monkeypatch, tmp_path, capsys):
    seen = []
    real = moe_layer.run_moe_benchmark
    monkeypatch.setattr(moe_layer, "run_moe_benchmark", lambda requested: seen.append(requested) or real(requested, {}))
    options = [word for pair in OPTIONS.items() for word in pair]
    assert run(["bench", "moe", *options, "--output", str(tmp_path / "new" / "moe.json")]) == 0
    assert seen[0].shape == SHAPE
    assert (seen[0].loads, seen[0].precisions, seen[0].clock) == (("balanced",), ("fp32",), time.process_time)
    written = json.loads((tmp_path / "new" / "moe.json").read_text())
    assert written["layers"][0]["load"] == "balanced"
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("fp32, balanced", "ours, loop", "left out: ours, megablocks"))


@pytest.mark.parametrize(("has_avx512", "precisions"), [(True, ("fp32", "bf16")), (False, ("fp32",))])
def test_precisions_that_the_processor_has_no_products_for_are_measured_only_by_name(
    has_avx512, precisions, monkeypatch
):
    from qsparse_moe.kernels import onednn

    requested = []
    monkeypatch.setattr(onednn, "_HAS_AVX512", has_avx512)
    monkeypatch.setattr(moe_layer, "run_moe_benchmark", lambda benchmark: requested.append(benchmark) or {"layers": []})
    assert run(["bench", "moe"]) == 0
    assert requested[0].precisions == precisions
    assert run(["bench", "moe", "--precision", "bf16"]) == 0
    assert requested[1].precisions == ("bf16",)
    assert requested[0].shape == moe_layer.SHAPES["cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load", "even"], "--load 'even' contains 'even'; choose from balanced, skewed"),
        (["--clock", "sun"], "--clock 'sun' contains 'sun'; choose from wall, processor"),
        (["--precision", "fp32,int3"], "--precision 'fp32,int3' contains 'int3'; choose from fp32, bf16"),
        (["--experts", "4", "--experts-per-token", "5"], "--experts-per-token (5) must be at most --experts (4)"),
        (["--experts", "64", "--hidden-size", "32"], "at most --hidden-size (32), whose first features hold the"),
    ],
)
def test_impossible_options_are_refused(options, message, capsys):
    assert run(["bench", "moe", *options]) == 2
    assert message in capsys.readouterr().err
