"""Evaluations, reports, checkpoints, and stops of a run, on one rank of the plain engine."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal

import pytest

from qsparse_moe.config.load import load_config
from qsparse_moe.config.schema import RoutingOverride
from qsparse_moe.data.token_data import load_data
from qsparse_moe.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training import loop, start
from qsparse_moe.training.checkpoint.store import list_checkpoints
from qsparse_moe.training.evaluate import evaluate_run
from qsparse_moe.training.loop import train
from tests.training.checkpoint.small_checkpoints import flip_a_byte


class Listener:
    def __init__(self, act=lambda report: None):
        self.reports, self.begun, self.ended, self.act = [], [], [], act

    def begin(self, context):
        self.begun.append(context)

    def end(self, result):
        self.ended.append(result)

    def __call__(self, report):
        self.reports.append(report)
        self.act(report)


def with_interval(config, interval):
    return config.model_copy(update={"metrics": config.metrics.model_copy(update={"interval": interval})})


def with_layer_gradients(config):
    return config.model_copy(update={"metrics": config.metrics.model_copy(update={"layer_gradients": True})})


def stop_after(step):
    def act(report):
        if report.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return Listener(act)


def test_reports_come_at_the_interval_at_evaluations_and_at_the_end(make_config):
    listener = Listener()
    config = with_interval(make_config(steps=7, evaluation_interval=5), 3)
    result = train(config, [listener])
    assert [report.step for report in listener.reports] == [3, 5, 6, 7]
    assert [report.validation is not None for report in listener.reports] == [False, True, False, True]
    tokens = 8 * 24
    assert [report.tokens for report in listener.reports] == [step * tokens for step in (3, 5, 6, 7)]
    assert result.validation == listener.reports[-1].validation and result.stopped_by is None and result.exit_code == 0
    assert listener.ended == [result]
    context = listener.begun[0]
    assert (context.start_step, context.tokens_per_step, context.world_size) == (0, tokens, 1)
    assert (context.engine, context.device, context.backend) == ("torch", "cpu", "grouped")
    seconds = [0.0, *(report.seconds for report in listener.reports)]
    for before, report, steps in zip(seconds, listener.reports, (3, 2, 1, 1), strict=False):
        assert report.step_seconds == pytest.approx((report.seconds - before) / steps)
        assert report.tokens_per_second == pytest.approx(tokens / report.step_seconds)
        # The seconds go on from step to step: those since the report before hold at least the parts of this step.
        own = sum(report.phase_seconds[part] for part in ("data", "forward", "backward", "update"))
        assert 0 < own < report.seconds - before
        assert report.memory["peak_resident"] >= report.memory["resident"] > 1e7
    assert result.seconds == listener.reports[-1].seconds


def test_layer_gradients_are_reported_on_request_and_change_nothing(make_config):
    plain, read = Listener(), Listener()
    train(make_config("plain", steps=3), [plain])
    train(with_layer_gradients(make_config("read", steps=3)), [read])
    assert [report.losses for report in read.reports] == [report.losses for report in plain.reports]
    assert [report.grad_norm for report in read.reports] == [report.grad_norm for report in plain.reports]
    assert [report.layer_grad_norms for report in plain.reports] == [None] * 3
    for report in read.reports:
        assert len(report.layer_grad_norms) == 2
        assert 0 < sum(norm**2 for norm in report.layer_grad_norms) < report.grad_norm**2


def test_the_run_folder_records_what_was_run(make_config):
    config = make_config(steps=2)
    result = train(config)
    assert load_config(result.run_dir / "config.yaml") == config
    manifest = json.loads((result.run_dir / "manifest.json").read_text())
    assert manifest["world_size"] == 1 and manifest["start_step"] == 0 and manifest["earlier_parts"] == []
    assert manifest["backends"]["model.moe.backend"] == "grouped"
    assert {"torch", "deepspeed", "datasets"} <= manifest["packages"].keys()
    train(make_config(steps=3, resume=True))
    manifest = json.loads((result.run_dir / "manifest.json").read_text())
    assert manifest["start_step"] == 2 and [part["start_step"] for part in manifest["earlier_parts"]] == [0]


def test_the_rate_and_the_sparsity_follow_their_schedules(make_config):
    listener = Listener()
    train(make_config(steps=6), [listener])
    assert [report.learning_rate for report in listener.reports[:2]] == pytest.approx([2.5e-3, 5e-3])
    assert listener.reports[-1].learning_rate == pytest.approx(5e-4)
    want = [0.0, 0.0, 0.125, 0.25, 0.375, 0.5]
    assert [report.sparsity for report in listener.reports] == pytest.approx(want)


def test_experts_per_token_follow_the_schedule_and_a_run_resumes_in_the_middle_of_it(make_config):
    def config(name, **training):
        made = make_config(name, steps=6, **training)
        moe = made.model.moe.model_copy(update={"experts_per_token": 3})
        fewer = made.model.sparsity.model_copy(
            update={"experts_per_token": 1, "routing_overrides": (RoutingOverride(layers=1, top_p=0.2),)}
        )
        model = made.model.model_copy(update={"moe": moe, "sparsity": fewer})
        return made.model_copy(update={"model": model})

    whole, first, second = Listener(), stop_after(4), Listener()
    train(config("whole"), [whole])
    used = [report.stats["router/routed_LE"].sum(-1) / (8 * 24) for report in whole.reports]
    # The scale of S rises from 0 in the second step to 1 in the sixth: three experts, then two, then one.
    assert [layer[0].item() for layer in used] == [3, 3, 2, 2, 2, 1]
    # The share falls from 1 in the second step to 0.2 in the sixth, which the first of three experts always reaches.
    by_share = [layer[1].item() for layer in used]
    assert by_share[:2] == [3, 3] and by_share == sorted(by_share, reverse=True) and by_share[-1] == 1
    train(config("parts"), [first])
    train(config("parts", resume=True), [second])
    assert [one.losses for one in first.reports + second.reports] == [one.losses for one in whole.reports]


def test_the_plan_is_set_only_when_the_scale_changes(make_config, monkeypatch):
    means = []
    set_sparsity = Transformer.set_sparsity

    def spy(model, plan):
        means.append(plan.mean)
        set_sparsity(model, plan)

    monkeypatch.setattr(Transformer, "set_sparsity", spy)
    train(make_config(steps=8))
    # The first two are the model's own, when it is built and when its buffers receive memory.
    assert means == pytest.approx([0.5, 0.5, 0.0, 0.125, 0.25, 0.375, 0.5])


def test_checkpoints_come_at_the_interval_and_at_the_end(make_config):
    result = train(make_config(steps=5, checkpoint_interval=2, keep_last=9))
    assert [path.name for path in list_checkpoints(result.run_dir)] == [f"step-0000000{step}" for step in (2, 4, 5)]


def test_an_existing_run_is_refused_and_left_alone(make_config):
    result = train(make_config(steps=2))
    before = {path: path.stat().st_mtime_ns for path in result.run_dir.rglob("*")}
    with pytest.raises(CheckpointError, match="never overwrites another"):
        train(make_config(steps=2))
    assert {path: path.stat().st_mtime_ns for path in result.run_dir.rglob("*")} == before


def test_a_broken_rule_comes_before_anything_is_written(make_config):
    config = make_config(global_batch_size=7)
    with pytest.raises(ConfigError, match="training.global_batch_size"):
        train(config)
    assert not run_folder(config).exists()


def test_sigterm_ends_with_a_checkpoint_and_an_exit_code(make_config, caplog):
    listener = stop_after(3)
    with caplog.at_level(logging.WARNING):
        result = train(make_config(), [listener])
    assert (result.step, result.stopped_by, result.exit_code, result.validation) == (3, 15, 143, None)
    ending = f"continues from {list_checkpoints(result.run_dir)[-1]}"
    assert f"SIGTERM: stopped after step 3 of 6 with a checkpoint; training.resume=true {ending}" in caplog.text
    assert [path.name for path in list_checkpoints(result.run_dir)] == ["step-00000003"]
    assert listener.ended == [result]


def test_a_request_to_stop_in_the_last_step_changes_nothing(make_config):
    result = train(make_config(steps=3), [stop_after(3)])
    assert result.stopped_by is None and result.validation is not None


def test_a_resumed_run_counts_its_seconds_and_steps_on(make_config):
    first = train(make_config(), [stop_after(3)])
    listener = Listener()
    second = train(make_config(resume=True), [listener])
    assert [report.step for report in listener.reports] == [4, 5, 6]
    assert listener.begun[0].start_step == 3 and listener.begun[0].start_seconds == first.seconds
    assert second.seconds > first.seconds and second.tokens == 2 * first.tokens
    assert listener.reports[0].tokens_per_second == pytest.approx(
        8 * 24 / (listener.reports[0].seconds - first.seconds)
    )


@pytest.mark.parametrize("mode", ["table", "streaming"])
def test_a_stopped_run_continues_with_the_next_sequences(make_config, mode):
    def config(name, **training):
        made = make_config(name, **training)
        return made.model_copy(update={"data": made.data.model_copy(update={"mode": mode})})

    whole, parts = Listener(), stop_after(3)
    train(config("whole"), [whole])
    train(config("parts"), [parts])
    train(config("parts", resume=True), [parts])
    assert [report.losses for report in parts.reports] == [report.losses for report in whole.reports]


def test_a_finished_run_can_be_resumed_to_no_steps_or_to_more(make_config):
    first = train(make_config(steps=2))
    again = train(make_config(steps=2, resume=True), [listener := Listener()])
    assert (again.step, again.validation, listener.reports) == (2, first.validation, [])
    more = train(make_config(steps=3, resume=True), [listener])
    assert more.step == 3 and [report.step for report in listener.reports] == [3]


def test_fewer_steps_than_were_done_are_refused_and_the_config_stays(make_config):
    result = train(make_config(steps=4))
    before = (result.run_dir / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"training\.steps \(3\) must be at least the 4 steps"):
        train(make_config(steps=3, resume=True))
    assert (result.run_dir / "config.yaml").read_text() == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_failed_before_its_first_step_starts_again_with_corrected_settings(make_config, monkeypatch, resume):
    def fail(*arguments, **settings):
        raise TrainingDiverged("step 1")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", fail)
        with pytest.raises(TrainingDiverged):
            train(make_config(steps=3, learning_rate=0.004))
    left = run_folder(make_config()) / "tokenizer"
    left.mkdir()
    corrected = make_config(steps=3, resume=resume)
    result = train(corrected)
    assert load_config(result.run_dir / "config.yaml") == corrected
    assert not left.exists(), "the copy of a tokenizer that the corrected run does not use"
    assert result.validation == train(make_config("whole", steps=3)).validation


def test_a_run_that_died_before_its_first_checkpoint_begins_again(make_config, caplog):
    whole = train(make_config("whole", steps=3))
    first = train(make_config(steps=3))
    shutil.rmtree(first.run_dir / "checkpoints")
    with caplog.at_level(logging.INFO):
        again = train(make_config(steps=3, resume=True))
    assert "has no complete checkpoint: the run starts again at step 0" in caplog.text
    assert again.validation == whole.validation


def test_leftovers_of_a_dead_process_are_removed(make_config):
    first = train(make_config(steps=2))
    for name in (".saving-step-00000009", ".deleting-step-00000001"):
        (first.run_dir / "checkpoints" / name).mkdir()
    train(make_config(steps=3, resume=True))
    names = [path.name for path in (first.run_dir / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000002", "step-00000003"]


def test_data_that_changed_is_noticed(make_config, text_folder, tmp_path):
    moved = tmp_path / "text"
    shutil.copytree(text_folder / "text", moved)
    config = make_config(steps=3)
    source = config.data.sources[0].model_copy(update={"path": str(moved / "*.txt")})
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source,)})})
    train(config, [stop_after(2)])
    (moved / "text-00.txt").write_text("something else " * 200)
    resumed = config.model_copy(update={"training": config.training.model_copy(update={"resume": True})})
    with pytest.raises(DataError, match="the data of this run differs from the checkpoint's"):
        train(resumed)


@pytest.mark.parametrize("device", ["cuda"])
def test_a_missing_device_is_reported_before_anything_is_written(make_config, device, monkeypatch):
    import torch

    from qsparse_moe.errors import BackendUnavailable

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = make_config(device=device)
    with pytest.raises(BackendUnavailable, match=r"training\.device \(cuda\)"):
        train(config)
    assert not run_folder(config).exists()


def test_a_weight_that_is_nan_stops_the_run_with_its_layer_and_the_last_checkpoint(make_config, monkeypatch):
    poisoned = []

    def poison(report):
        if report.step == 2:
            poisoned[0].layers[1].moe.experts.w_down.data[0, 0, 0] = float("nan")

    build = start.build_empty

    def keep(*arguments, **settings):
        poisoned.append(build(*arguments, **settings))
        return poisoned[0]

    monkeypatch.setattr(start, "build_empty", keep)
    config = make_config(checkpoint_interval=2)
    with pytest.raises(TrainingDiverged) as caught:
        train(config, [Listener(poison)])
    message = str(caught.value)
    assert message.startswith("step 3: the output of layer 1 is not finite on rank 0. Nothing of this step was saved.")
    assert message.endswith(f"resume from the last checkpoint: {run_folder(config)}/checkpoints/step-00000002")


def test_a_run_does_not_resume_from_a_checkpoint_in_which_a_byte_has_changed(make_config):
    file = list_checkpoints(train(make_config(steps=2)).run_dir)[-1] / "rank-00000-of-00001.safetensors"
    flip_a_byte(file)
    with pytest.raises(
        CheckpointError, match=r"00001\.safetensors does not have the checksum that it was written with"
    ):
        train(make_config(steps=3, resume=True))
    assert [path.name for path in list_checkpoints(file.parents[2])] == ["step-00000002"]


def test_validation_in_the_middle_of_a_ramp_is_that_of_its_checkpoint(make_config):
    listener = Listener()
    intervals = {"evaluation_interval": 2, "checkpoint_interval": 2, "keep_last": 9}
    result = train(make_config(**intervals), [listener])
    found = {report.step: report.validation for report in listener.reports if report.validation is not None}
    assert sorted(found) == [2, 4, 6]
    for path in reversed(list_checkpoints(result.run_dir)):
        evaluation = evaluate_run(result.run_dir)
        assert {name: getattr(evaluation, name) for name in found[evaluation.step]} == found[evaluation.step]
        shutil.rmtree(path)


def test_an_evaluation_in_the_middle_changes_no_later_step(make_config):
    """The router's jitter and the capacity apply in training only: both are active again after an evaluation."""
    moe = {"num_experts": 4, "expert_hidden_size": 24, "backend": "loop", "router_jitter": 0.3, "capacity_factor": 0.5}
    losses = {}
    for interval in (0, 2):
        listener = Listener()
        config = make_config(f"every-{interval}", model={"moe": moe}, steps=5, evaluation_interval=interval)
        train(config, [listener])
        losses[interval] = [report.losses for report in listener.reports]
    assert len(losses[0]) == 5 and losses[2] == losses[0]


def test_the_log_says_how_often_each_source_is_read(make_config, text_folder, caplog):
    config = make_config(steps=4)
    whole = config.data.sources[0]
    small = whole.model_copy(update={"path": str(text_folder / "text" / "text-0[0-4].txt"), "weight": 3.0})

    def data_of(*sources):
        return config.data.model_copy(update={"sources": sources})

    with caplog.at_level(logging.INFO):
        train(config.model_copy(update={"data": data_of(whole, small)}))
    lines = [record.getMessage() for record in caplog.records if ": read " in record.getMessage()]
    assert len(lines) == 2
    # Three quarters of the sequences of four steps of eight come from the small source.
    for index, (source, share) in enumerate(((whole, 0.25), (small, 0.75))):
        before, times, after = re.fullmatch(r"(.*): read ([\d.e-]+) times (.*)", lines[index]).groups()
        assert (before, after) == (f"data.sources.{index} ({source.path})", "in the 4 steps of the run")
        assert float(times) == pytest.approx(4 * 8 * share / len(load_data(data_of(source)).train), rel=0.02)
