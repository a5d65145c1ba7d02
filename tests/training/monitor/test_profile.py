"""A profile of a few steps, read back as Perfetto reads it."""

from __future__ import annotations

import gzip
import json
import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.profiler import ProfilerActivity

from qsparse_moe.config.rules import check_config
from qsparse_moe.config.schema import MetricsConfig
from qsparse_moe.errors import ConfigError
from qsparse_moe.training.loop import train
from qsparse_moe.training.monitor import profile as profile_module
from qsparse_moe.training.monitor.profile import StepProfiler


def profiled(config, first, steps):
    changes = {"profile_from": first, "profile_steps": steps, "interval": 4}
    return config.model_copy(update={"metrics": config.metrics.model_copy(update=changes)})


@pytest.mark.slow
def test_the_trace_contains_the_phases_and_the_operators_of_the_requested_steps_only(make_config):
    result = train(profiled(make_config(steps=5), 3, 2))
    folder = result.run_dir / "profile"
    with gzip.open(folder / "steps-3-4.json.gz", "rt", encoding="utf-8") as file:
        trace = json.load(file)
    names = [
        event.get("name", "") for event in trace["traceEvents"] if event.get("cat") in ("user_annotation", "cpu_op")
    ]
    assert sorted({name for name in names if name.startswith("step ")}) == ["step 3", "step 4"]
    micro_batches = 4
    counted = {part: names.count(part) for part in ("data", "forward", "backward", "update")}
    # The data of the step is taken at its beginning, and that of the next one is waited for after the backward pass.
    assert counted == {"data": 4, "forward": 2 * micro_batches, "backward": 2 * micro_batches, "update": 2}
    assert any("grouped_mm" in name for name in names) and "aten::embedding" in names
    table = (folder / "steps-3-4.txt").read_text()
    assert "Self CPU" in table and "forward" in table


class Recorded:
    """A replacement for PyTorch's profiler that keeps what it was asked for."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self, **settings):
        self.settings, self.calls = settings, []
        self.made.append(self)

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")

    def export_chrome_trace(self, path):
        self.calls.append(("export", path))

    def key_averages(self):
        return SimpleNamespace(table=lambda **settings: f"table {settings}")


def profiler(folder, *, first=3, steps=2, start_step=0, records=True, device="cpu"):
    config = MetricsConfig(profile_from=first, profile_steps=steps)
    return StepProfiler(config, folder, start_step=start_step, device=torch.device(device), records=records)


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(profile_module, "profile", Recorded)
    return Recorded.made


def run_steps(made_profiler, numbers):
    on = []
    for number in numbers:
        with made_profiler.step(number):
            on.append((number, made_profiler.is_on))
    return [number for number, is_on in on if is_on]


def test_the_requested_steps_are_recorded_once_and_written_after_the_last(tmp_path, made):
    steps = profiler(tmp_path)
    assert run_steps(steps, range(1, 4)) == [3] and steps.is_on and made[0].calls == ["start"]
    assert run_steps(steps, range(4, 7)) == [4] and not steps.is_on and len(made) == 1
    trace = tmp_path / "profile" / "steps-3-4.json.gz"
    assert made[0].calls == ["start", "stop", ("export", str(trace))]
    assert made[0].settings == {"activities": [ProfilerActivity.CPU], "record_shapes": True}
    table = trace.with_name("steps-3-4.txt").read_text()
    assert table == "table {'sort_by': 'self_cpu_time_total', 'row_limit': 40}"
    steps.close()
    assert len(made[0].calls) == 3, "nothing is left to write"


def test_a_run_that_ends_within_the_steps_writes_what_it_has_and_an_error_is_not_repeated(tmp_path, made, monkeypatch):
    monkeypatch.setattr(Recorded, "export_chrome_trace", lambda self, path: 1 / 0)
    steps = profiler(tmp_path)
    assert run_steps(steps, [3]) == [3]
    with pytest.raises(ZeroDivisionError):
        steps.close()
    steps.close()
    assert made[0].calls == ["start", "stop"]


@pytest.mark.parametrize("settings", [{"records": False}, {"steps": 0}])
def test_another_rank_and_a_run_without_a_profile_record_nothing(settings, tmp_path, made):
    steps = profiler(tmp_path, **settings)
    assert run_steps(steps, range(1, 7)) == [] and made == []
    steps.close()
    assert list(tmp_path.iterdir()) == []


def test_on_cuda_the_kernels_are_recorded_and_rank_the_operators(tmp_path, made):
    steps = profiler(tmp_path, first=1, steps=1, device="cuda")
    run_steps(steps, [1])
    assert made[0].settings["activities"] == [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    assert "self_cuda_time_total" in (tmp_path / "profile" / "steps-1-1.txt").read_text()


@pytest.mark.parametrize(("start_step", "refused"), [(2, False), (3, True)])
def test_a_resumed_run_may_still_profile_the_step_after_its_own(start_step, refused, tmp_path, made):
    if not refused:
        assert run_steps(profiler(tmp_path, start_step=start_step), range(start_step + 1, 7)) == [3, 4]
        return
    with pytest.raises(ConfigError, match=r"metrics\.profile_from \(3\) must be .*\(3\); profile from step 4"):
        profiler(tmp_path, start_step=start_step)
    profiler(tmp_path, start_step=start_step, steps=0)


def test_nothing_is_profiled_unless_requested(make_config):
    assert not (train(make_config(steps=2)).run_dir / "profile").exists()


def test_steps_beyond_the_end_are_refused(make_config):
    message = (
        "metrics.profile_from (4) and metrics.profile_steps (3) end with step 6, which must be at most training.steps "
        "(5); begin earlier, profile fewer steps, or train for at least 6 steps"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(profiled(make_config(steps=5), 4, 3))


def test_resumed_run_refuses_steps_that_are_over_and_keeps_what_is_profiled(make_config):
    train(profiled(make_config(steps=2), 2, 1))
    train(profiled(make_config(steps=3, resume=True), 2, 1))
    message = r"^metrics\.profile_from \(3\) .*\(3\); profile from step 4 or later, or set metrics\.profile_steps to 0$"
    with pytest.raises(ConfigError, match=message):
        train(profiled(make_config(steps=4, resume=True), 3, 1))
