"""The metrics of a run that was stopped and resumed are those of an uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal

import pytest

from qsparse_moe.errors import CheckpointError
from qsparse_moe.metrics.jsonl import read_metrics
from qsparse_moe.metrics.recorder import Recorder
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from qsparse_moe.training.loop import train
from tests.support.metrics import same_in_every_run
from tests.support.runs import tiny_config
from tests.training.checkpoint.small_checkpoints import flip_a_byte

STEPS, DEAD_WINDOW, FEATURE_WINDOW = 14, 5, 10
"""Number of logged steps per window; every step is logged."""
EVALUATED = [3, 6, 9, 12, 14]
DRIFT = "sparsity/expert_hidden/threshold_drift"
AGREEMENT = "router/choice_agreement"


class Killed(Exception):
    """Ends a run without a checkpoint."""


def stop_in(step):
    """A listener that requests a stop during ``step``, after which the run ends with a checkpoint."""

    def listen(report):
        if report.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def die_after(step):
    """A listener that ends the run at the report of ``step``, after the recorder has written it."""

    def listen(report):
        if report.step == step:
            raise Killed

    return listen


class Runs:
    """Runs of one config under different names, in one folder."""

    def __init__(self, text_folder, output):
        self._text_folder, self._output = text_folder, output

    def config(self, name, *, metrics=None, **training):
        settings = {"engine": "torch", "output_dir": str(self._output), "steps": STEPS, "evaluation_interval": 3}
        config = tiny_config(self._text_folder, name, **(settings | {"checkpoint_interval": 2} | training))
        changes = {"interval": 1, "dead_expert_window": DEAD_WINDOW, "tensorboard": False} | (metrics or {})
        return config.model_copy(update={"metrics": config.metrics.model_copy(update=changes)})

    def train(self, name, *listeners, **settings):
        """Train or resume the run ``name`` with a recorder and ``listeners``, and return its logged steps."""
        config = self.config(name, resume=True, **settings)
        with contextlib.suppress(Killed):
            train(config, [Recorder(config), *listeners])
        return self.rows(name)

    def rows(self, name):
        rows = read_metrics(run_folder(self.config(name)) / "metrics.jsonl")
        return [same_in_every_run(row) for row in rows]

    def newest(self, name):
        return Checkpoint(list_checkpoints(run_folder(self.config(name)))[-1])


@pytest.fixture(scope="module")
def runs(text_folder, tmp_path_factory):
    made = Runs(text_folder, tmp_path_factory.mktemp("runs"))
    made.train("whole")
    return made


def steps_with(name, rows):
    return [row["step"] for row in rows if name in row]


def test_every_metric_of_a_run_stopped_within_its_windows_is_that_of_an_uninterrupted_one(runs):
    runs.train("stopped", stop_in(4))
    runs.train("stopped", stop_in(8))
    rows = runs.train("stopped")
    assert rows == runs.rows("whole")
    assert steps_with("router/dead_experts_window", rows) == [*range(DEAD_WINDOW, STEPS + 1)]
    assert steps_with("sparsity/expert_hidden/dead_features", rows) == [*range(FEATURE_WINDOW, STEPS + 1)]
    assert steps_with(DRIFT, rows) == [*range(2, STEPS + 1)]
    assert steps_with(AGREEMENT, rows) == EVALUATED[1:]
    assert rows[-1].keys() >= {"efficiency/total_kept_training_flops", "experts"}


def test_a_killed_run_continues_the_windows_of_its_last_checkpoint(runs):
    assert runs.train("killed", die_after(5))[-1]["step"] == 5
    assert runs.newest("killed").progress.step == 4
    runs.train("killed", die_after(11))
    assert runs.train("killed") == runs.rows("whole")


def test_a_stop_where_an_evaluation_is_due_leaves_it_to_the_resumed_run(runs):
    stopped = runs.train("late", stop_in(3))
    assert stopped[-1]["step"] == 3 and steps_with("validation/loss", stopped) == []
    assert runs.newest("late").report_state(0).evaluation_pending
    # Once more killed before there is another checkpoint, and once more stopped.
    assert steps_with("validation/loss", runs.train("late", die_after(4))) == [3]
    assert steps_with(AGREEMENT, runs.train("late", stop_in(6))) == []
    rows = runs.train("late")
    assert rows == runs.rows("whole") and steps_with(AGREEMENT, rows) == EVALUATED[1:]
    assert not runs.newest("late").report_state(0).evaluation_pending


def test_steps_between_the_last_logged_one_and_the_checkpoint_are_counted(runs):
    settings = {"metrics": {"interval": 2, "dead_expert_window": 6}, "evaluation_interval": 0}
    runs.train("between", stop_in(5), **settings)
    assert runs.newest("between").progress.step == 5
    rows = runs.train("between", **settings)
    assert rows == runs.train("whole-between", **settings)
    assert steps_with("router/dead_experts_window", rows) == [6, 8, 10, 12, 14]


def as_by_an_earlier_version(checkpoint):
    index = json.loads(checkpoint.index_file.read_text())
    del index["listeners"], index["evaluation_pending"], index["files"]["listeners.json"]
    checkpoint.index_file.write_text(json.dumps(index))
    (checkpoint.path / "listeners.json").unlink()


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_empty_windows_and_says_so(runs, caplog):
    runs.train("earlier", stop_in(4))
    as_by_an_earlier_version(runs.newest("earlier"))
    with caplog.at_level(logging.INFO):
        rows = runs.train("earlier", die_after(10))
    said = [record.getMessage() for record in caplog.records if "earlier version" in record.getMessage()]
    assert len(said) == 1 and "step-00000004" in said[0] and "start with an empty window" in said[0]
    assert steps_with("router/dead_experts_window", rows) == [9, 10], "five steps of the second part"
    assert steps_with(DRIFT, rows) == [2, 3, 4, 6, 7, 8, 9, 10]
    assert steps_with(AGREEMENT, rows) == [9], "the second evaluation of the second part"
    total = "efficiency/total_kept_training_flops"
    assert [row[total] for row in rows] == [row[total] for row in runs.rows("whole")][:10]


def test_changed_settings_of_the_metrics_start_with_empty_windows_and_say_so(runs, caplog):
    runs.train("changed", stop_in(4))
    with caplog.at_level(logging.INFO):
        rows = runs.train("changed", die_after(12), metrics={"interval": 2}, evaluation_rows=7)
    assert steps_with(DRIFT, rows) == [2, 3, 4, 8, 9, 10, 12]
    assert steps_with(AGREEMENT, rows) == [9, 12]
    said = [record.getMessage() for record in caplog.records if "start" in record.getMessage()]
    assert [text for text in said if text.startswith("metrics.interval was 1 before the resume and is 2")]
    assert [text for text in said if "training.evaluation_rows" in text and AGREEMENT in text]


def test_a_damaged_state_of_the_listeners_is_named(runs):
    runs.train("damaged", stop_in(3))
    file = runs.newest("damaged").path / "listeners.json"
    flip_a_byte(file)
    with pytest.raises(CheckpointError, match=r"listeners\.json does not have the checksum"):
        runs.train("damaged")
    checkpoint = runs.newest("damaged")
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"listeners\.json cannot be read"):
        checkpoint.report_state(0)


class Counter:
    """A minimal listener with a state."""

    state_name = "counter"

    def __init__(self):
        self.calls, self.order = 0, []

    def begin(self, context):
        self.order.append("begin")

    def __call__(self, report):
        self.calls += 1

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.order.append("load")
        self.calls = state["calls"]


def test_any_listener_may_have_a_state_which_is_loaded_after_its_beginning(runs):
    first, second, other = Counter(), Counter(), Counter()
    runs.train("counted", first, stop_in(3))
    other.state_name = "other"
    runs.train("counted", second, other, die_after(5))
    assert (first.calls, first.order) == (3, ["begin"])
    assert (second.calls, second.order) == (5, ["begin", "load"])
    assert (other.calls, other.order) == (2, ["begin"])


def test_two_listeners_of_one_name_are_refused_before_anything_is_written(runs):
    with pytest.raises(ValueError, match=r"names \['counter', 'counter', 'metrics'\].*another state_name"):
        runs.train("twice", Counter(), Counter())
    assert not run_folder(runs.config("twice")).exists()
