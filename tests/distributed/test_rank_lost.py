"""A rank that dies or hangs ends the others, which name it, and the run continues from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.distributed.test_kill import newest_step, start_on_nodes, wait_until
from tests.support.launch import end, entry, run_plan
from tests.support.runs import LAYOUTS, tiny_config, write_text

pytestmark = pytest.mark.distributed

# Of a rank that is killed; twice what the watch and the launcher need, for a machine that is busy.
PROMPTLY = 60


def long_run(folder, layout, ranks, **changes):
    settings = {"steps": 100_000, "checkpoint_interval": 3, "global_batch_size": 2 * ranks, "resume": True}
    return tiny_config(folder, "lost", **(LAYOUTS[layout] | settings | changes))


def pid_of(folder, rank):
    return int((folder / "launch" / f"rank{rank}.pid").read_text())


def wait_for(condition, timeout):
    end = time.monotonic() + timeout
    while not condition():
        time.sleep(0.05)
        assert time.monotonic() < end, "it did not happen in time"


@pytest.mark.parametrize(("layout", "ranks_by_node", "victim"), [("zero2", [2], 1), ("torch", [1, 2], 0)])
def test_a_rank_that_is_killed_is_named_by_all_remaining_ranks_and_the_run_resumes(
    tmp_path, layout, ranks_by_node, victim
):
    """Rank 0 hosts the store of the heartbeats, and usually logs for all ranks. No launcher notifies those of other
    nodes when it ends."""
    write_text(tmp_path / "text")
    ranks = sum(ranks_by_node)
    config = long_run(tmp_path, layout, ranks)
    run_dir = tmp_path / "runs" / "lost"
    processes = start_on_nodes(tmp_path / "launch", config, ranks_by_node)
    try:
        wait_until(lambda: newest_step(run_dir) > 0, processes[0], timeout=300)
        pid = pid_of(tmp_path, victim)
        os.kill(pid, signal.SIGKILL)
        codes = [process.wait(PROMPTLY) for process in processes]
    finally:
        end(processes)
    assert any(codes), "the launcher of the killed rank"
    log = (tmp_path / "launch" / "log.txt").read_text()
    assert not (tmp_path / "launch" / f"killed.rank{victim}.json").exists()
    for rank in set(range(ranks)) - {victim}:
        error = json.loads((tmp_path / "launch" / f"killed.rank{rank}.json").read_text())["error"]
        assert error.startswith(f"RankLost: rank {victim} (process {pid} on "), error
        assert f", of {ranks} ranks, sent no heartbeat for " in error and f"Rank {rank} ends too." in error
        assert "training.resume=true continues from" in error and error.endswith(f"step-{newest_step(run_dir):08d}")
        assert error.removeprefix("RankLost: ") in log
    if victim == 0:
        return
    done = newest_step(run_dir)
    resumed = long_run(tmp_path, layout, ranks, steps=done + 3)
    outcome = run_plan(tmp_path / "again", [entry("resumed", resumed)], ranks=ranks)["resumed"][0]
    assert outcome["error"] is None and outcome["context"]["start_step"] == done
    assert outcome["result"]["step"] == done + 3


def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path):
    """The connections of a stopped process stay open: no collective fails, and only the heartbeats show it."""
    write_text(tmp_path / "text")
    config = long_run(tmp_path, "torch", 2, collective_timeout=8.0)
    processes = start_on_nodes(tmp_path / "launch", config, [2])
    try:
        wait_until(lambda: newest_step(tmp_path / "runs" / "lost") > 0, processes[0], timeout=300)
        pid = pid_of(tmp_path, 1)
        os.kill(pid, signal.SIGSTOP)
        log = tmp_path / "launch" / "log.txt"
        wait_for(lambda: f"rank 1 (process {pid} on " in log.read_text(), PROMPTLY)
    finally:
        end(processes)
