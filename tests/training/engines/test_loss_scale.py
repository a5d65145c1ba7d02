"""The loss scale against DeepSpeed's, and the effects of an overflow on a step."""

from __future__ import annotations

import logging
import math
import random

import pytest
import torch

from qsparse_moe.config.schema import LossScaleConfig, RunConfig, TrainingConfig
from qsparse_moe.errors import TrainingDiverged
from qsparse_moe.metrics.derive import derive_metrics
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training.engines.loss_scale import LossScaler, build_loss_scaler
from qsparse_moe.training.engines.protocol import STATE_KINDS
from qsparse_moe.training.loop import train
from qsparse_moe.training.monitor.non_finite import NonFiniteGuard
from qsparse_moe.training.step import train_step
from tests.metrics.reports import make_report
from tests.training.engines.test_torch_engine import ALONE, make_engine, random_batches
from tests.training.test_loop import Listener, stop_after


def settings(**changes):
    return LossScaleConfig(**({"initial_power": 6, "window": 3, "hysteresis": 2, "minimum": 2} | changes))


def training(**changes):
    return RunConfig(training=TrainingConfig(**changes))


def history(scaler, overflows):
    scales = []
    for overflow in overflows:
        scales.append(scaler.scale)
        scaler.update(overflow)
    return scales


def test_only_fp16_has_a_scale():
    made = {name: build_loss_scaler(training(precision=name), 3) for name in ("fp32", "bf16", "fp16")}
    assert made["fp32"] is made["bf16"] is None
    assert (made["fp16"].scale, made["fp16"].factor) == (2**16, 3 * 2**16)


def test_the_scale_falls_after_overflows_and_rises_after_a_window_without():
    overflows = [True, True, True, False, False, False, False, True, True, False]
    assert history(LossScaler(settings()), overflows) == [64, 64, 32, 16, 16, 16, 16, 32, 32, 16]
    assert history(LossScaler(settings(hysteresis=1)), [True, True, False]) == [64, 32, 16]


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_scale_follows_the_rule_of_deepspeed(hysteresis, window):
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    chance = random.Random(window + 10 * hysteresis)
    ours = LossScaler(settings(window=window, hysteresis=hysteresis, minimum=1))
    theirs = loss_scaler.DynamicLossScaler(
        init_scale=64,
        scale_window=window,
        min_scale=1,
        delayed_shift=hysteresis,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.float32,
    )
    scales = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
        for _ in range(300):
            overflow = chance.random() < 0.3
            ours.update(overflow)
            theirs.update_scale(overflow)
            scales.append(ours.scale)
            assert ours.scale == theirs.cur_scale
    assert len(set(scales)) > 3


def test_the_scale_is_exhausted_when_it_overflows_at_its_minimum_and_only_then():
    scaler = LossScaler(settings(initial_power=2, hysteresis=1))
    seen = []
    for overflow in (True, False, True, False):
        scaler.update(overflow)
        seen.append((scaler.scale, scaler.is_exhausted))
    assert seen[0] == (2, False) and seen[1] == (2, False) and seen[2] == (2, True)
    assert scaler.skipped_steps == 2


def test_the_state_of_the_scale_is_resumed():
    chance = random.Random(3)
    overflows = [chance.random() < 0.3 for _ in range(60)]
    whole = LossScaler(settings())
    scales = history(whole, overflows)
    for cut in (1, 7, 30):
        first, second = LossScaler(settings()), LossScaler(settings())
        history(first, overflows[:cut])
        second.load_state_dict(first.state_dict())
        assert history(second, overflows[cut:]) == scales[cut:]
        assert second.state_dict() == whole.state_dict()


def step_through(engine, batches, steps):
    guard = NonFiniteGuard(2, ALONE, engine.loss_scaler)
    return [
        train_step(engine, batches, step=step, learning_rate=0.01, guard=guard, report=True)
        for step in range(1, steps + 1)
    ]


def fp16_engine(tmp_path, **changes):
    scale = {"initial_power": 30, "window": 2, "hysteresis": 1} | changes
    return make_engine(tmp_path, precision="fp16", loss_scale=scale)[1]


def test_a_step_that_overflows_changes_nothing_but_the_scale(tmp_path, caplog):
    engine, batches = fp16_engine(tmp_path), random_batches()
    before = {(name, kind): engine.held(name, kind).clone() for name in engine.shapes() for kind in STATE_KINDS}
    with caplog.at_level(logging.WARNING):
        outcome = step_through(engine, batches, 1)[0]
    assert math.isinf(outcome.grad_norm) and outcome.loss_scale == 2**30 and math.isfinite(outcome.losses["loss"])
    assert (engine.adam_step, engine.loss_scaler.scale, engine.loss_scaler.skipped_steps) == (0, 2**29, 1)
    assert all(engine.held(*key).equal(value) for key, value in before.items())
    assert {p.grad for p in engine.model.parameters()} == {None}
    assert (
        "step 1: skipped because its gradient overflows fp16 (the gradient that enters layer 1 from above"
        in caplog.text
    )
    assert "the loss scale of the next step is 5.36871e+08" in caplog.text


def test_a_step_under_the_scale_is_that_of_fp32_to_rounding(tmp_path):
    scaled, plain = fp16_engine(tmp_path, initial_power=12), make_engine(tmp_path)[1]
    batches = random_batches()
    for half, full in zip(step_through(scaled, batches, 3), step_through(plain, batches, 3), strict=True):
        assert half.losses["loss"] == pytest.approx(full.losses["loss"], abs=3e-3)
        assert half.grad_norm == pytest.approx(full.grad_norm, rel=2e-2)
        assert full.loss_scale is None
    assert scaled.adam_step == 3 and scaled.loss_scaler.skipped_steps == 0
    assert {p.dtype for p in scaled.model.parameters()} == {torch.float16}
    assert {scaled.held(name, kind).dtype for name in scaled.shapes() for kind in STATE_KINDS} == {torch.float32}


def test_the_scale_leaves_the_gradient_as_it_is(tmp_path):
    """Without overflow and underflow a scale that is a power of two changes no bit."""
    batches = random_batches()
    norms, weights = [], []
    for power in (8, 11):
        engine = fp16_engine(tmp_path, initial_power=power)
        norms.append(step_through(engine, batches, 1)[0].grad_norm)
        weights.append(engine.held("layers.0.attention.qkv.weight", "weight").clone())
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-2)


def test_the_norms_of_the_layers_are_without_the_scale(tmp_path):
    batches, norms = random_batches(), []
    for engine in (fp16_engine(tmp_path, initial_power=12), make_engine(tmp_path)[1]):
        guard = NonFiniteGuard(2, ALONE, engine.loss_scaler)
        outcome = train_step(
            engine, batches, step=1, learning_rate=0.01, guard=guard, report=True, layer_gradients=True
        )
        norms.append(outcome.layer_grad_norms)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2) and len(norms[0]) == 2


def test_an_overflow_at_the_smallest_scale_ends_the_run(tmp_path):
    engine = fp16_engine(tmp_path, minimum=2**29)
    step_through(engine, random_batches(), 1)
    with pytest.raises(TrainingDiverged) as caught:
        step_through(engine, random_batches(), 1)
    message = str(caught.value)
    assert message.startswith("step 1: the gradient overflows fp16 at the smallest loss scale, 5.36871e+08 (training.")
    assert "(training.loss_scale.minimum) (the gradient that enters layer 1 from above is not finite" in message
    assert message.endswith("or resume from the last checkpoint")


@pytest.mark.parametrize("place", ["weight", "head"])
def test_a_forward_pass_that_is_not_finite_is_not_treated_as_an_overflow(tmp_path, place):
    engine = fp16_engine(tmp_path, initial_power=8)
    name = {"weight": "layers.0.attention.output.weight", "head": "head.weight"}[place]
    dict(engine.model.named_parameters())[name].data.fill_(torch.inf)
    what = {"weight": "the output of layer 0", "head": "the loss"}[place]
    with pytest.raises(TrainingDiverged, match=f"step 1: {what} is not finite on rank 0"):
        step_through(engine, random_batches(), 1)
    assert engine.loss_scaler.skipped_steps == 0


def test_a_run_in_fp16_reports_its_scale_and_resumes_it(make_config):
    """The run overflows in its first step, doubles its scale after three steps, and overflows again after a resume."""

    def config(name, **changes):
        scale = {"initial_power": 18, "window": 2, "hysteresis": 1}
        return make_config(name, precision="fp16", loss_scale=scale, **changes)

    whole, parts = Listener(), stop_after(4)
    train(config("whole"), [whole, Recorder(config("whole"))])
    train(config("parts"), [parts])
    train(config("parts", resume=True), [parts])
    scales = [(report.loss_scale, report.skipped_steps) for report in whole.reports]
    assert scales == [(2**18, 1), (2**17, 1), (2**17, 1), (2**17, 1), (2**18, 2), (2**17, 2)]
    assert [math.isinf(report.grad_norm) for report in whole.reports] == [True, False, False, False, True, False]
    assert [(report.loss_scale, report.skipped_steps) for report in parts.reports] == scales
    assert [report.losses for report in parts.reports] == [report.losses for report in whole.reports]
    rows = read_metrics(run_folder(config("whole")) / "metrics.jsonl")
    assert [(row["train/loss_scale"], row["train/skipped_steps"]) for row in rows] == scales
    assert rows[0]["train/grad_norm"] is None


def test_other_precisions_have_no_metric_of_the_scale(make_config):
    model = make_config().model
    assert not {"train/loss_scale", "train/skipped_steps"} & derive_metrics(make_report(), model).keys()
    metrics = derive_metrics(make_report(loss_scale=8.0, skipped_steps=3), model)
    assert (metrics["train/loss_scale"], metrics["train/skipped_steps"]) == (8.0, 3.0)
