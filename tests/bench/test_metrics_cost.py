"""The benchmark of what metrics cost, on runs of a few steps."""

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
