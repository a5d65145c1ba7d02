"""What is wrong with one of two ranks is one message on both of them, and nothing is lost."""

from __future__ import annotations

import re

import pytest

from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints
from tests.distributed.conftest import Runs

pytestmark = pytest.mark.distributed


def message_of(runs: Runs, label: str) -> str:
    messages = {outcome["error"] for outcome in runs.outcomes[f"bad-{label}", 2]}
    assert len(messages) == 1, f"every rank must say the same: {messages}"
    return messages.pop()


def test_ranks_with_other_settings_are_named_before_anything_is_written(runs: Runs):
    message = message_of(runs, "settings")
    assert message.startswith("ConfigError: training.learning_rate is 0.005 on rank 0 and 0.001 on rank 1; ")
    assert "training.seed is 0 on rank 0 and 3 on rank 1; all ranks must have the same config" in message
    assert not runs.folder_of("bad-settings", 2).exists()


def test_a_disk_that_is_full_on_another_rank_ends_both_with_a_later_checkpoint(runs: Runs):
    message = message_of(runs, "full_disk")
    found = re.fullmatch(
        r"CheckpointError: \S*step-00000001: cannot be written \(No space left on device\); .*"
        r" The run ended after step (\d+) of 50; training\.resume=true continues from \S*/step-(\d+)",
        message,
    )
    assert found is not None, message
    kept = list_checkpoints(runs.folder_of("bad-full_disk", 2))
    # Later ones were tried as if nothing had happened; the first one has left nothing.
    assert [int(path.name.removeprefix("step-")) for path in kept] == [*range(2, int(found[1]) + 1)]
    assert int(found[2]) == int(found[1]) < 50 and Checkpoint(kept[-1]).verify() is None
    assert not list(kept[-1].parent.glob(".*"))
