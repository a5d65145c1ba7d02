"""A profile of a few steps, read back as Perfetto reads it."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from qsparse_moe.config.rules import check_config
from qsparse_moe.errors import ConfigError
from qsparse_moe.training.loop import train


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
    assert counted == {"data": 2, "forward": 2 * micro_batches, "backward": 2 * micro_batches, "update": 2}
    assert any("grouped_mm" in name for name in names) and "aten::embedding" in names
    table = (folder / "steps-3-4.txt").read_text()
    assert "Self CPU" in table and "forward" in table


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
