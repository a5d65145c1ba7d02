"""The benchmark of what metrics cost, on runs of a few steps."""

from types import SimpleNamespace

import pytest

from qsparse_moe.bench import metrics_cost
from qsparse_moe.bench.metrics_cost import run_metrics_benchmark
from qsparse_moe.metrics.recorder import Recorder
from tests.support.runs import tiny_config, write_text


@pytest.fixture
def config(tmp_path):
    write_text(tmp_path / "text")
    config = tiny_config(tmp_path, "unused", engine="torch")
    return config.model_copy(
        update={"metrics": config.metrics.model_copy(update={"interval": 5, "tensorboard": False})}
    )


@pytest.mark.slow
def test_a_record_that_sleeps_costs_its_sleep_over_the_interval(config, monkeypatch):
    slow, records = 0.5, []

    def sleep(self, report):
        records.append(report.step)
        metrics_cost.time.sleep(slow)
        return record(self, report)

    record = Recorder.__call__
    monkeypatch.setattr(Recorder, "__call__", sleep)
    result = run_metrics_benchmark(config, steps=6, rounds=1)
    assert records == [1, 2, 3, 4, 5, 6] * 2
    assert slow / 2 < result["seconds_a_record"] < 2 * slow and result["seconds_once"] > slow
    assert result["cost"]["median"] == result["seconds_a_record"] / 5 / result["seconds_a_step"]
    assert (result["interval"], result["steps"], len(result["cost_by_round"])) == (5, 6, 1)


def test_costs_are_counted_per_record_after_the_first_and_per_step_without_the_untimed_round(config, monkeypatch):
    def run(config, steps, metrics, *, records):
        number = len(calls) // 2
        calls.append(records)
        # 10 ms per record after a first one of 0.5 s, beside steps of 100 ms; each round is twice as long.
        wall = 0.6 + 0.5 + 5 * 0.01 if records else 0.6
        return SimpleNamespace(wall_seconds=2**number * wall, step_seconds=2**number * 0.6), 2**number * 0.5

    calls = []
    monkeypatch.setattr(metrics_cost, "_run", run)
    result = run_metrics_benchmark(config, steps=6, rounds=2)
    assert calls == [True, False] * 3
    found = [result[name] for name in ("seconds_a_record", "seconds_a_step", "seconds_once")]
    assert found == pytest.approx([0.03, 0.3, 1.5])  # medians of the second and third round
    assert result["cost_by_round"] == pytest.approx([0.02, 0.02])
