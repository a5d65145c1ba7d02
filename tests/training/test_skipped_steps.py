"""Steps whose gradient is not finite or is an outlier change nothing, in every engine."""

from __future__ import annotations

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.config.schema import SkipStepsConfig
from qsparse_moe.data.loader import TrainLoader
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.training import loop
from qsparse_moe.training.loop import train
from qsparse_moe.training.monitor import skipped_steps
from qsparse_moe.training.monitor.skipped_steps import StepFilter
from tests.support.runs import LAYOUTS, OFFLOADED

BAD_STEP = 3
NO_OUTLIERS = {"limit": 1, "window": 4}
OUTLIERS = {"limit": 1, "sigma": 20.0, "window": 4}


@pytest.fixture
def weigh_step(monkeypatch):
    """Return a function that multiplies the losses of some steps, counted from 1, by a number."""
    batches = TrainLoader.batches

    def weigh(*steps, weight):
        def weighed(loader, step):
            found = batches(loader, step)
            return [b._replace(loss_weight=torch.tensor(weight)) for b in found] if step + 1 in steps else found

        monkeypatch.setattr(TrainLoader, "batches", weighed)

    return weigh


def losses_of(config):
    reports = []
    train(config, listeners=[reports.append])
    return [report.losses["loss"] for report in reports], reports


@pytest.fixture
def states(monkeypatch):
    """Return the weights and Adam's counter before and after every step of the run, by its number."""
    found = {}
    train_step = loop.train_step

    def state(engine):
        weights = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        return weights | {"adam_step": torch.tensor(engine.adam_step)}

    def recorded(engine, batches, *, step, **settings):
        before = state(engine)
        outcome = train_step(engine, batches, step=step, **settings)
        found[step] = (before, state(engine), outcome.skipped)
        return outcome

    monkeypatch.setattr(loop, "train_step", recorded)
    return found


@pytest.mark.parametrize(
    ("weight", "settings"), [(math.nan, NO_OUTLIERS), (math.inf, NO_OUTLIERS), (math.nan, OUTLIERS), (1e3, OUTLIERS)]
)
def test_a_skipped_step_changes_neither_weights_nor_the_optimizer(make_config, weigh_step, states, weight, settings):
    weigh_step(BAD_STEP, weight=weight)
    _, reports = losses_of(make_config(skip_steps=settings))
    for step, (before, after, skipped) in states.items():
        same = {name for name, value in before.items() if torch.equal(value, after[name])}
        assert skipped == (step == BAD_STEP)
        assert same == (set(before) if step == BAD_STEP else set()), step
    assert [report.skipped_steps for report in reports] == [0, 0, 1, 1, 1, 1]
    assert math.isfinite(reports[BAD_STEP - 1].grad_norm) == (weight == 1e3)
    assert all(math.isfinite(report.grad_norm) for report in reports if report.step != BAD_STEP)


def test_an_outlier_changes_the_weights_unless_they_are_asked_for(make_config, weigh_step, states):
    weigh_step(BAD_STEP, weight=1e3)
    _, reports = losses_of(make_config(skip_steps=NO_OUTLIERS))
    assert [skipped for _, _, skipped in states.values()] == [False] * 6
    assert reports[-1].skipped_steps == 0


@pytest.mark.parametrize(
    ("precision", "layouts", "tolerance"),
    [
        ("fp32", ["zero0", "zero1", "zero2_cpu", "zero3", "zero3_cpu"], 3e-6),
        ("bf16", ["zero0", "zero1", "zero2", "zero3"], 2e-3),
    ],
)
def test_every_engine_goes_on_as_the_plain_one_does(make_config, weigh_step, precision, layouts, tolerance):
    """DeepSpeed has five optimizers, each with gradients of its own that must be dropped."""
    pytest.importorskip("deepspeed")
    weigh_step(2, weight=math.nan)
    settings = {"skip_steps": NO_OUTLIERS, "precision": precision, "steps": 4}
    want, _ = losses_of(make_config("want", **settings))
    assert math.isnan(want.pop(1))
    for layout in layouts:
        found, reports = losses_of(make_config(layout, **((LAYOUTS | OFFLOADED)[layout] | settings)))
        assert reports[-1].skipped_steps == 1 and math.isnan(found.pop(1)), layout
        assert found == pytest.approx(want, rel=tolerance), layout


def test_one_more_than_the_limit_ends_the_run_with_the_reason_and_the_way_out(make_config, weigh_step):
    weigh_step(2, 4, weight=math.nan)
    config = make_config(skip_steps={"limit": 1, "window": 3})
    with pytest.raises(
        TrainingDiverged,
        match=r"^step 4: the loss is not finite on rank 0, and 2 of the last 3 steps would be skipped, more than "
        r"training\.skip_steps\.limit \(1\)\. Nothing of this step was saved\. Lower training\.learning_rate, .* raise "
        r"the limit, and resume from the last checkpoint: there is none yet$",
    ):
        train(config)


def test_steps_skipped_outside_of_the_window_do_not_count(make_config, weigh_step):
    weigh_step(2, 5, weight=math.nan)
    _, reports = losses_of(make_config(skip_steps={"limit": 1, "window": 3}))
    assert [report.skipped_steps for report in reports] == [0, 1, 1, 1, 2, 2]


def test_the_reason_is_logged(make_config, weigh_step, caplog):
    weigh_step(BAD_STEP, weight=1e3)
    losses_of(make_config(skip_steps=OUTLIERS))
    (line,) = [record.getMessage() for record in caplog.records if "skipped because" in record.getMessage()]
    assert line.startswith("step 3: skipped because its gradient norm, ")
    assert "is more than 20 standard deviations (" in line and "above the mean of the 2 steps before it" in line
    assert line.endswith("; 1 steps were skipped since the start of the run")


def test_metrics_of_a_skipped_step_are_null_where_they_are_not_finite_and_later_ones_are_finite(
    make_config, weigh_step
):
    from qsparse_moe.metrics.jsonl import read_metrics
    from qsparse_moe.metrics.recorder import Recorder

    weigh_step(BAD_STEP, weight=math.nan)
    config = make_config(skip_steps=NO_OUTLIERS)
    result = train(config, listeners=[Recorder(config)])
    rows = list(read_metrics(result.run_dir / "metrics.jsonl"))
    assert [row["train/skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["train/loss"] is None and rows[2]["train/grad_norm"] is None
    assert all(value is not None for row in rows[3:] for value in row.values())


def test_a_resumed_run_skips_the_steps_that_an_unbroken_one_skips(make_config, weigh_step):
    """The norms of the steps before the stop decide over those after it, and count towards the limit."""
    weigh_step(3, 5, weight=1e3)
    settings = {"skip_steps": {"limit": 2, "sigma": 20.0, "window": 4}}
    want, reports = losses_of(make_config("whole", **settings))
    assert [report.skipped_steps for report in reports] == [0, 0, 1, 1, 2, 2]

    def stop(report):
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(make_config("parts", **settings), listeners=[stop]).step == 4
    found, reports = losses_of(make_config("parts", resume=True, **settings))
    assert [report.skipped_steps for report in reports] == [2, 2]
    assert found == want[4:]


class Norms:
    """Stands for an engine in fp32 on one rank: it gives the norms of the steps one after the other."""

    loss_scaler = None
    distributed = SimpleNamespace(rank=0)

    def __init__(self, monkeypatch, *norms):
        left = list(norms)
        monkeypatch.setattr(skipped_steps, "gradient_norm", lambda engine: left.pop(0))


@pytest.mark.parametrize(("window", "first"), [(2, 3), (3, 3), (4, 3), (6, 4), (7, 4)])
def test_outliers_are_skipped_once_half_a_window_and_at_least_two_norms_are_known(monkeypatch, window, first):
    """``first`` is the number of the first step that may be skipped; all before it are taken, however large."""
    for spike in range(2, first + 1):
        step_filter = StepFilter(SkipStepsConfig(limit=1, sigma=2.0, window=window))
        engine = Norms(monkeypatch, *([1.0, 1.1] * 4)[: spike - 1], 50.0)
        found = [step_filter.skips(engine, step, fault="") for step in range(1, spike + 1)]
        assert found == [None] * (spike - 1) + [50.0 if spike == first else None], spike


def test_the_threshold_is_the_mean_and_the_deviation_of_the_norms_in_the_window_without_skipped_ones(monkeypatch):
    # Of 2, 4, 3, 5 the mean is 3.5 and the sample deviation 1.291; the first norm, 100, has left the window.
    engine = Norms(monkeypatch, 100.0, 2.0, 4.0, 3.0, 5.0, 6.09, 6.07, 9.0)
    step_filter = StepFilter(SkipStepsConfig(limit=3, sigma=2.0, window=4))
    found = [step_filter.skips(engine, step, fault="") for step in range(1, 8)]
    assert found == [None, None, None, None, None, 6.09, None]
    assert step_filter.num_skipped == 1 and list(step_filter._norms) == [4.0, 3.0, 5.0, 6.07]
