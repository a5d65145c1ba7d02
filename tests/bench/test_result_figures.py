"""Figures of the benchmarks by hand, from given times: rates, directions of ratios, and units of the tables."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.bench import decode, decode_gpu, moe_layer, moe_text, step
from qsparse_moe.bench.decode import OURS, DecodeBenchmark
from qsparse_moe.bench.decode_gpu import MODULES
from qsparse_moe.bench.harness import Timing
from qsparse_moe.bench.moe_layer import MoEBenchmark
from qsparse_moe.bench.moe_peers import LayerShape
from qsparse_moe.bench.random_weights import fill_random
from qsparse_moe.bench.step import DENSE, PEER, SPARSE, StepBenchmark, run_step_benchmark
from qsparse_moe.cli import bench, bench_decode
from qsparse_moe.inference.kv_cache import KeyValueCache
from tests.inference.models import config

CPU = torch.device("cpu")


def decode_benchmark(**changed):
    settings = {"formats": ["bf16"], "sparsities": [0.5], "batches": [3], "context": 5, "tokens": 4, "rounds": 3}
    return DecodeBenchmark(config(num_layers=1), **settings | {"prompt": 0, "peers": ()} | changed)


def test_rates_and_ratios_of_the_step_benchmark(monkeypatch):
    times = {PEER: Timing((6.0, 8.0, 14.0)), DENSE: Timing((3.0, 2.0, 7.0)), SPARSE: Timing((6.0, 8.0, 7.0))}
    monkeypatch.setattr(step, "_contenders", lambda benchmark, tokens_BS: dict.fromkeys(times))
    monkeypatch.setattr(step, "time_in_turns", lambda steps, **settings: times)
    monkeypatch.setattr(step, "_profile", lambda step, device: {})
    result = run_step_benchmark(StepBenchmark(config(), "fp32", 0.5, 2, 16, 3, CPU))
    assert result["seconds"] == {PEER: 8.0, DENSE: 3.0, SPARSE: 7.0}
    assert result["tokens_per_second"] == {PEER: 4.0, DENSE: 32 / 3, SPARSE: 32 / 7}
    assert result["times_faster_than_peer"] == {
        DENSE: {"median": 2.0, "min": 2.0, "max": 4.0},
        SPARSE: {"median": 1.0, "min": 1.0, "max": 2.0},
    }
    assert result["cost_of_q_sparse"] == {"median": 2.0, "min": 1.0, "max": 4.0}


def test_both_models_of_the_step_benchmark_have_their_s():
    benchmark = StepBenchmark(config(), "bf16", 0.75, 2, 16, 1, CPU)
    models = [step._ours(benchmark, sparsity, "topk") for sparsity in (0.0, benchmark.sparsity)]
    assert [model.sparsity_plan.mean for model in models] == [0.0, 0.75]
    assert {model.head.weight.dtype for model in models} == {torch.bfloat16}
    hidden_only = step._ours(dataclasses.replace(benchmark, site="expert_hidden"), 0.75, "topk").sparsity_plan
    assert {site for (_, site), values in hidden_only.values.items() if any(values)} == {"expert_hidden"}
    assert hidden_only.values[0, "expert_hidden"] == models[1].sparsity_plan.values[0, "expert_hidden"]


def test_the_decode_benchmark_can_have_s_at_one_site_only():
    assert decode_benchmark().plan(config(), 0.5).mean == 0.5
    plan = decode_benchmark(site="expert_hidden").plan(config(), 0.5)
    assert {site for (_, site), values in plan.values.items() if any(values)} == {"expert_hidden"}


def test_rates_and_ratios_of_a_row_of_the_decode_benchmark():
    dense, sparse, peer = f"{OURS} S 0", f"{OURS} S 0.5", "peer"
    timings = {dense: Timing((8.0, 4.0, 6.0)), sparse: Timing((2.0, 4.0, 3.0)), peer: Timing((6.0, 20.0, 12.0))}
    ours = {dense: SimpleNamespace(bytes_per_step=900.0), sparse: SimpleNamespace(bytes_per_step=300.0)}
    row = lambda name: decode._row(name, 3, timings, ours, decode_benchmark(), 1000.0)  # noqa: E731
    # Four steps of three tokens in three seconds; 400 of 1000 bytes per second.
    assert row(sparse) == {
        "contender": sparse,
        "batch": 3,
        "tokens_per_second": 4.0,
        "seconds_by_round": (2.0, 4.0, 3.0),
        "times_ours_dense": {"median": 2.0, "min": 1.0, "max": 4.0},
        "bytes_per_step": 300.0,
        "share_of_limit": pytest.approx(0.4),
        "times_peer": {peer: {"median": 4.0, "min": 3.0, "max": 5.0}},
    }
    assert row(peer)["times_ours_dense"] == {"median": 0.5, "min": pytest.approx(0.2), "max": pytest.approx(4 / 3)}
    assert "share_of_limit" not in row(peer) and "times_peer" not in row(peer)


def test_contenders_that_measure_themselves_take_turns_and_the_first_round_is_left_out():
    order, seconds = [], {"a": iter((9.0, 1.0, 2.0)), "b": iter((8.0, 3.0, 4.0))}
    found = decode.seconds_in_turns({n: lambda n=n: order.append(n) or next(seconds[n]) for n in "ab"}, 2)
    assert {name: timing.seconds_by_round for name, timing in found.items()} == {"a": (1.0, 2.0), "b": (3.0, 4.0)}
    assert order == ["a", "b"] * 3


def test_every_measurement_of_decoding_starts_behind_the_context_and_averages_the_bytes_of_its_steps():
    class Engine:
        def __init__(self):
            self.positions, self.tokens, self.bytes_read = [], [], 0

        def decode(self, tokens_B, cache: KeyValueCache):
            self.positions.append(cache.positions_B.tolist())
            self.tokens.append(tokens_B.tolist())
            cache.advance()
            self.bytes_read = 100 * len(self.positions)
            return torch.eye(8)[tokens_B + 2]

    engine = Engine()
    ours = decode._Ours(engine, SimpleNamespace(config=config(num_layers=1)), 2, decode_benchmark(tokens=2))
    assert ours.cache.capacity == 7
    assert ours() >= 0.0 and ours.bytes_per_step == 150.0
    ours()
    assert engine.positions == [[5, 5], [6, 6]] * 2 and engine.tokens == [[1, 2], [3, 4]] * 2
    assert ours.bytes_per_step == 350.0


def test_prefill_is_compared_with_ours(monkeypatch):
    benchmark, model = decode_benchmark(prompt=8, rounds=1), SimpleNamespace(config=config(num_layers=1))
    timings = {OURS: Timing((2.0, 4.0, 1.0)), "peer": Timing((8.0, 2.0, 6.0))}
    monkeypatch.setattr(decode, "seconds_in_turns", lambda contenders, rounds: timings)
    ours, peer = decode._prefill(benchmark, model, {})
    assert (ours["contender"], ours["tokens_per_second"]) == (OURS, 4.0)
    assert (peer["contender"], peer["tokens_per_second"]) == ("peer", 8 / 6)
    assert peer["ours_times_faster"] == {"median": 4.0, "min": 0.5, "max": 6.0}


def test_rates_and_ratios_of_the_decode_benchmark_of_a_gpu(monkeypatch, capsys):
    times = {MODULES: (6.0, 8.0), f"{OURS} S 0": (3.0, 2.0), f"{OURS} S 0.5": (1.0, 2.0)}
    monkeypatch.setattr(decode_gpu.triton_engine, "why_not", lambda model: None)
    monkeypatch.setattr(decode_gpu, "_Steps", lambda *_: None)
    monkeypatch.setattr(
        decode_gpu, "seconds_in_turns", lambda contenders, rounds: {name: Timing(times[name]) for name in contenders}
    )
    result = decode_gpu.run_gpu_decode_benchmark(decode_benchmark(), CPU)
    modules, dense, sparse = result["formats"]["bf16"]["decode"]
    assert [row["tokens_per_second"] for row in (modules, dense, sparse)] == [12 / 7, 12 / 2.5, 8.0]
    assert sparse["times_ours_dense"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert sparse["times_peer"] == {MODULES: {"median": 5.0, "min": 4.0, "max": 6.0}}
    assert modules["times_peer"] == {} and modules["times_ours_dense"]["max"] == 0.5
    bench_decode._print_tables(result)  # has neither a bandwidth nor a prefill
    printed = capsys.readouterr().out
    assert "8.0" in printed and "medians of 3 rounds" in printed and "bandwidth" not in printed
    bench_decode._print_tables(result | {"read_bandwidth": 12.34e9})
    assert "Read bandwidth 12.3 GB/s; medians of 3 rounds" in capsys.readouterr().out


def test_our_layers_are_compared_with_the_others_and_not_the_other_way_round(monkeypatch):
    times = {"dense": (4.0, 9.0), moe_layer.OUR_CHAIN: (1.0, 1.0), "ours": (2.0, 3.0)}
    monkeypatch.setattr(moe_layer, "training_step", lambda contender: contender)
    monkeypatch.setattr(
        moe_layer, "time_in_turns", lambda steps, **settings: {name: Timing(times[name]) for name in steps}
    )
    monkeypatch.setattr(moe_layer.trace, "peak_bytes", lambda step, *, device: 5)
    monkeypatch.setattr(moe_layer.trace, "profile", lambda step, *, device: {})
    benchmark = MoEBenchmark(LayerShape(4, 2, 3, 4, 2), ("fp32",), ("balanced",), 0.5, 2, 1, CPU)
    others = dict.fromkeys(("dense", moe_layer.OUR_CHAIN))
    found = moe_layer._measure(benchmark, dict.fromkeys(["ours"]), others, 100.0)
    assert found["times_as_fast_as"] == {
        "ours": {
            "dense": {"median": 2.5, "min": 2.0, "max": 3.0},
            moe_layer.OUR_CHAIN: {"median": pytest.approx(5 / 12), "min": pytest.approx(1 / 3), "max": 0.5},
        }
    }
    flops = 3 * 3 * 2 * 8 * 2 * 3
    assert found["flops_per_second"]["ours"] == flops / 2.5
    assert found["share_of_peak"]["ours"] == pytest.approx(flops / 250)


def test_the_peak_is_that_of_the_fastest_product(monkeypatch):
    monkeypatch.setattr(moe_layer, "PEAK_SIZE", {"cpu": 10})
    monkeypatch.setattr(
        moe_layer, "time_in_turns", lambda products, **settings: {"a": Timing((4.0, 2.0)), "b": Timing((0.5, 8.0))}
    )
    assert moe_layer.matrix_peak("fp32", CPU) == 4000.0


def test_the_table_of_layers_has_ms_gflops_shares_and_megabytes():
    layer = {
        "precision": "fp32",
        "load": "skewed",
        "rows_per_expert": [5, 1, 2, 0],
        "seconds": {"dense": 0.25, "ours": 0.125},
        "flops_per_second": {"dense": 2e12, "ours": 4e12},
        "share_of_peak": {"dense": 0.25, "ours": 0.5},
        "peak_bytes": {"dense": 7_000_000, "ours": 3_000_000},
        "times_as_fast_as": {"ours": {"dense": {"median": 2.0, "min": 1.5, "max": 3.0}}},
        "left_out": {"x": "absent"},
    }
    lines = moe_text._times(layer).splitlines()
    assert "the busiest expert has 2.50 times the mean rows" in lines[0]
    assert lines[-1] == "Left out: x (absent)."
    rows = [line for line in lines if line.startswith(("| dense", "| ours"))]
    assert rows == [
        "| dense | 250.0 | 2,000 | 0.25 | 7 |  |",
        "| ours | 125.0 | 4,000 | 0.50 | 3 | 2.00 (1.50 to 3.00) |",
    ]


def test_random_weights_have_the_requested_deviation_and_no_two_equal_rows():
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4200, bias=False), torch.nn.LayerNorm(8))
    fill_random(model, 0.5)
    weight = model[0].weight.detach()
    assert weight.std() == pytest.approx(0.5, rel=0.01) and weight.mean().abs() < 0.01
    assert not (weight[4096:] == weight[:104]).all(-1).any(), "the tile is no multiple of a row"
    assert (model[1].weight == 1).all() and (model[1].bias == 1).all()


def test_tables_of_the_command_line_have_their_units(capsys):
    timing = {"median": 2.0, "min": 1.5, "max": 3.0}
    step_result = {
        "seconds": {PEER: 0.25, SPARSE: 0.125},
        "tokens_per_second": {PEER: 1234.0, SPARSE: 2468.0},
        "times_faster_than_peer": {SPARSE: timing},
    }
    bench._print_tables({"fp32": step_result}, StepBenchmark(config(), "fp32", 0.5, 2, 16, 3, CPU))
    printed = capsys.readouterr().out
    assert "One training step of 32 tokens" in printed
    rows = {row[2]: row[3:6] for line in printed.splitlines() if (row := [c.strip() for c in line.split("│")])[2:]}
    assert rows[PEER] == ["250", "1,234", ""] and rows[SPARSE] == ["125", "2,468", "2.00 (1.50 to 3.00)"]

    operation = {"name": "op", "shape": [3, 4], "precision": "fp32", "seconds": {"forward": {"native": 0.0125}}}
    bench._print_operations({"device": "cpu", "operations": [operation]})
    printed = capsys.readouterr().out
    assert "3 x 4" in printed and "12.500" in printed and "Operations on cpu, milliseconds" in printed

    decoded = {"batch": 3, "contender": "ours", "tokens_per_second": 4.0, "bytes_per_step": 7_300_000.0}
    decoded |= {"share_of_limit": 0.42, "times_ours_dense": timing, "times_peer": {"peer": timing | {"median": 1.75}}}
    prefill = {"contender": "peer", "tokens_per_second": 321.0, "ours_times_faster": timing | {"median": 5.25}}
    bench_decode._print_tables(
        {
            "formats": {"int8": {"head": "int8", "decode": [decoded], "prefill": [prefill]}},
            "shape": {"prompt": 8, "rounds": 3},
            "read_bandwidth": 1e9,
        }
    )
    cells = [[cell.strip() for cell in line.split("│")][1:-1] for line in capsys.readouterr().out.splitlines()]
    assert ["3", "ours", "4.0", "7.3", "0.42", "2.00", "peer 1.75"] in cells
    assert ["peer", "321", "5.25"] in cells
