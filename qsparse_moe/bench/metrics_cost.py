"""Measure the cost of recording metrics: runs that record every step against runs that record nothing, in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsparse_moe.bench.harness import fingerprint
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.report import Listener, RunContext, StepReport
from qsparse_moe.training.loop import train


class _Stopwatch:
    """The last listener of a run: measures the wall clock up to the last report, and the time of the steps in it."""

    def begin(self, context: RunContext) -> None:
        self._start = time.perf_counter()

    def __call__(self, report: StepReport) -> None:
        self.wall_seconds = time.perf_counter() - self._start
        self.step_seconds = report.seconds


class _TimedRecorder(Recorder):
    """A recorder that times its first record separately, because it imports matplotlib and lays out the figures."""

    first_seconds: float | None = None

    def __call__(self, report: StepReport) -> None:
        start = time.perf_counter()
        super().__call__(report)
        if self.first_seconds is None:
            self.first_seconds = time.perf_counter() - start


def run_metrics_benchmark(config: RunConfig, *, steps: int, rounds: int) -> dict[str, Any]:
    """Measure the share of the time of a step that metrics take at the interval of ``config``.

    Each round consists of two runs in this process with the plain engine. One records every step and draws images in
    the same proportion of its records as ``config``; the other reports only its last step, to the stopwatch. The
    difference per record, divided by the interval, is the time that recording adds to a step.

    Args:
        config: a complete run, of which the model, data, and training settings and the intervals are used.
        steps: number of steps per run.
        rounds: number of timed rounds, after one untimed round.

    Returns:
        ``cost``: median, minimum, and maximum over the rounds; seconds per step, per record, and once per run; and
        the machine.
    """
    interval = config.metrics.interval
    images = max(1, config.metrics.image_interval // interval) if config.metrics.image_interval else 0
    shares, records, plain, once = [], [], [], []
    for number in range(rounds + 1):
        recorded, first = _run(config, steps, {"interval": 1, "image_interval": images}, records=True)
        # The last step is always reported, so an interval of all steps is as quiet as a run can be.
        silent, _ = _run(config, steps, {"interval": steps, "tensorboard": False}, records=False)
        # The first round pays for imports and caches that later rounds share.
        if number == 0:
            continue
        once.append(first)
        # The first record is excluded on both sides: its one-time cost is reported separately.
        records.append((recorded.wall_seconds - first - silent.wall_seconds) / (steps - 1))
        plain.append(silent.step_seconds / steps)
        shares.append(records[-1] / interval / plain[-1])
    return {
        "benchmark": "metrics",
        "machine": fingerprint(),
        "interval": interval,
        "image_interval": config.metrics.image_interval,
        "steps": steps,
        "rounds": rounds,
        "seconds_a_step": statistics.median(plain),
        "seconds_a_record": statistics.median(records),
        "seconds_once": statistics.median(once),
        "cost": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        "cost_by_round": shares,
    }


def _run(config: RunConfig, steps: int, metrics: dict[str, Any], *, records: bool) -> tuple[_Stopwatch, float]:
    """Train once; return the stopwatch and the seconds of the first record, which are 0 without records."""
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        training = {
            "name": "run",
            "output_dir": folder,
            "steps": steps,
            "warmup_steps": 0,
            "engine": "torch",
            "evaluation_interval": 0,
            # A run always ends with an evaluation, which is kept as short as possible.
            "evaluation_rows": config.training.micro_batch_size,
            "checkpoint_interval": 0,
            "resume": False,
        }
        changed = config.model_copy(
            update={
                "training": config.training.model_copy(update=training),
                "metrics": config.metrics.model_copy(update=metrics),
            }
        )
        recorder = _TimedRecorder(changed)
        listeners: Sequence[Listener] = [recorder, watch] if records else [watch]
        train(changed, listeners)
        # A silent failure to record would look like a cost of zero.
        assert Path(folder, "run", "metrics.jsonl").exists() == records
    return watch, recorder.first_seconds or 0.0
