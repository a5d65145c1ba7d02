"""Turn-taking and ratios of the benchmark harness, with a clock that the test moves."""

import pytest
import torch

from qsparse_moe.bench import harness
from qsparse_moe.bench.harness import Timing, fingerprint, ratio, time_in_turns
from qsparse_moe.bench.step import DENSE, PEER, SPARSE, StepBenchmark, run_step_benchmark
from qsparse_moe.config.schema import ModelConfig, MoEConfig


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    return now


def test_contenders_take_turns_and_settling_calls_are_not_timed(clock):
    order = []

    def contender(name, durations):
        durations = iter(durations)

        def call():
            order.append(name)
            clock[0] += next(durations)

        return call

    # Warm-up round, then two rounds; the first call of each turn settles and is slow.
    timings = time_in_turns(
        {"a": contender("a", [99, 99, 99, 99, 2, 4, 99, 6, 6]), "b": contender("b", [99, 99, 99, 99, 1, 1, 99, 3, 3])},
        rounds=2,
        calls=2,
        settle=1,
    )
    assert order == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert timings["a"].seconds_by_round == (3, 6)
    assert ratio(timings["a"], timings["b"]) == {"median": 2.5, "min": 2, "max": 3}
    assert Timing((1.0, 5.0, 2.0)).median == 2.0


def test_the_fingerprint_names_processor_and_software():
    found = fingerprint()
    assert found["torch"] == torch.__version__
    assert found["processor"]
    assert found["cores"] >= 1


def test_the_step_benchmark_measures_all_three_and_reports_the_time_of_each_part():
    moe = MoEConfig(num_experts=4, expert_hidden_size=32, activation="swiglu")
    model = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, moe=moe)
    result = run_step_benchmark(StepBenchmark(model, "fp32", 0.5, 2, 16, 2, torch.device("cpu")))
    assert set(result["seconds"]) == {PEER, DENSE, SPARSE}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    for name in (DENSE, SPARSE):
        ratio = result["times_faster_than_peer"][name]
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    shares = list(result["profile"][SPARSE].values())
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[0] <= sum(shares) <= 1
