"""Processes that are killed, by SIGKILL at any moment and by Ctrl-C under the launcher."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from tests.distributed.random_kills import run_with_kills
from tests.distributed.test_layouts import state_of
from tests.support.launch import RANKS, entry, kill_group, run_plan, start_nodes
from tests.support.ranks import SLOW_DISK
from tests.support.runs import LAYOUTS, tiny_config, write_text

pytestmark = pytest.mark.distributed

STEPS = 12


def wait_until(condition, process, timeout=120.0):
    """Poll every two milliseconds until the condition holds; the process must not end before."""
    end = time.monotonic() + timeout
    while not condition():
        time.sleep(0.002)
        assert process.poll() is None, f"the run ended by itself ({process.returncode}) before it was to be killed"
        assert time.monotonic() < end, "the run did not get there"


def is_saving(run_dir: Path) -> bool:
    return any(path.name.startswith(".saving-") for path in (run_dir / "checkpoints").glob(".*"))


def start_run(folder: Path, config, *, ranks: int, fault=None):
    return start_on_nodes(folder, config, [ranks], fault=fault)[0]


def start_on_nodes(folder: Path, config, ranks_by_node, *, fault=None):
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps([entry("killed", config, fault=fault)]))
    with (folder / "log.txt").open("a") as log:
        return start_nodes([str(RANKS), str(plan)], ranks_by_node, output=log)


@pytest.mark.parametrize(("layout", "ranks", "moments"), [("torch", 1, "save any save any"), ("zero2", 2, "save")])
def test_sigkill_at_any_moment_costs_only_the_steps_since_the_last_checkpoint(tmp_path, layout, ranks, moments):
    write_text(tmp_path / "text")
    settings = LAYOUTS[layout] | {"steps": STEPS, "checkpoint_interval": 1}
    config = tiny_config(tmp_path, "killed", resume=True, **settings)
    run_dir = tmp_path / "runs" / "killed"
    delay = random.Random(7)
    steps_at_death = []
    for moment in moments.split():
        done = len(steps_at_death) and steps_at_death[-1]
        process = start_run(tmp_path / "launch", config, ranks=ranks, fault=SLOW_DISK)
        try:
            wait_until(lambda done=done: newest_step(run_dir) > done, process)
            if moment == "save":
                wait_until(lambda: is_saving(run_dir), process)
            time.sleep(delay.uniform(0, 0.15))
        finally:
            kill_group(process)
        steps_at_death.append(newest_step(run_dir))
        assert Checkpoint(list_checkpoints(run_dir)[-1]).verify() is None
    assert steps_at_death == sorted(set(steps_at_death)) and steps_at_death[-1] < STEPS
    plan = [entry("killed", config), entry("whole", tiny_config(tmp_path, "whole", **settings))]
    outcomes = run_plan(tmp_path / "last", plan, ranks=ranks)
    killed, whole = outcomes["killed"][0], outcomes["whole"][0]
    assert killed["error"] is None and whole["error"] is None
    assert killed["context"]["start_step"] == steps_at_death[-1]
    same = [report["losses"] for report in whole["reports"][steps_at_death[-1] :]]
    assert [report["losses"] for report in killed["reports"]] == same
    assert killed["result"] == whole["result"]
    want, have = state_of(tmp_path / "runs" / "whole")[1], state_of(run_dir)[1]
    assert [key for key in want if not have[key].equal(want[key])] == []
    assert not is_saving(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 4)])
def test_random_kills_leave_the_metrics_and_weights_of_an_uninterrupted_run_and_no_lock(tmp_path, ranks, kills):
    """One kill while it loads, and one each in a step, in a background save and in an evaluation. 100 kills:
    ``python -m tests.distributed.random_kills FOLDER``."""
    found = run_with_kills(tmp_path, kills=kills, ranks=ranks, compiles=False)
    assert sum(found["kills"].values()) == kills
    assert (found["differences"], found["left_behind"]) == ([], [])


def test_ctrl_c_under_the_launcher_saves_and_the_run_can_be_resumed(tmp_path):
    """The terminal signals all processes, and the launcher sends SIGTERM to the ranks in addition."""
    write_text(tmp_path / "text")
    config = tiny_config(tmp_path, "killed", **(LAYOUTS["zero1"] | {"steps": 100_000, "checkpoint_interval": 3}))
    run_dir = tmp_path / "runs" / "killed"
    process = start_run(tmp_path / "launch", config, ranks=2)
    try:
        wait_until(lambda: newest_step(run_dir) > 0, process)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
        files = [tmp_path / "launch" / f"killed.rank{rank}.json" for rank in (0, 1)]
        end = time.monotonic() + 30
        while not all(file.exists() for file in files) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            kill_group(process)
    results = [json.loads(file.read_text())["result"] for file in files]
    assert results[0] == results[1] and results[0]["stopped_by"] in (signal.SIGINT, signal.SIGTERM)
    assert newest_step(run_dir) == results[0]["step"]
    log = (tmp_path / "launch" / "log.txt").read_text()
    assert "stopping after this step, with a checkpoint" in log
    assert f"stopped after step {results[0]['step']} of 100000 with a checkpoint" in log


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    paths = list_checkpoints(run_dir)
    return int(paths[-1].name.removeprefix("step-")) if paths else 0
