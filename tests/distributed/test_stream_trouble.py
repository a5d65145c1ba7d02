"""A record that one of two ranks cannot read, in the middle of a stream."""

from __future__ import annotations

import pytest

from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from tests.distributed.conftest import STREAM_STEPS, Runs
from tests.distributed.test_layouts import series, state_of

pytestmark = pytest.mark.distributed


@pytest.fixture
def checkpoint(runs: Runs) -> Checkpoint:
    (path,) = list_checkpoints(runs.folder_of("stream-broken", 2))
    return Checkpoint(path)


def step_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.path.name.removeprefix("step-"))


def test_both_ranks_name_the_record_and_save_the_finished_steps(runs: Runs, checkpoint):
    done = step_of(checkpoint)
    assert 1 <= done < STREAM_STEPS and checkpoint.verify() is None and checkpoint.world_size == 2
    first, second = runs.outcomes["stream-broken", 2]
    assert first["error"] == second["error"]
    assert first["error"].startswith("DataError: ") and "part-1.jsonl, row 20" in first["error"]
    assert f"The run ended after step {done} of {STREAM_STEPS}; training.resume=true continues from" in first["error"]
    assert first["error"].endswith(checkpoint.path.name)
    assert len(first["reports"]) == done


def test_if_the_record_may_be_skipped_the_run_continues_as_if_it_had_not_ended(runs: Runs, checkpoint):
    whole, resumed = runs("stream-whole", 2), runs("stream-resumed", 2)
    done = step_of(checkpoint)
    assert resumed["context"]["start_step"] == done
    before = [report["losses"]["loss"] for report in runs.outcomes["stream-broken", 2][0]["reports"]]
    assert before + series(resumed, "loss") == series(whole, "loss")
    want, have = (state_of(runs.folder_of(f"stream-{label}", 2))[1] for label in ("whole", "resumed"))
    assert [key for key in want if not have[key].equal(want[key])] == []
