"""Two launchers, as on two machines: node ranks, a common rendezvous address, and no ssh."""

from __future__ import annotations

import pytest

from tests.distributed.conftest import Runs
from tests.distributed.test_layouts import series, state_of
from tests.support.launch import entry, run_plan
from tests.support.runs import LAYOUTS, tiny_config

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def on_two_nodes(runs: Runs):
    settings = LAYOUTS["zero2"] | {"evaluation_interval": 3}
    plan = [entry("two-nodes", tiny_config(runs.folder, "two-nodes", **settings))]
    return run_plan(runs.folder / "two-nodes", plan, ranks=2, nodes=2)["two-nodes"]


def test_two_nodes_have_the_losses_of_two_ranks_on_one_exactly(runs: Runs, on_two_nodes):
    one = runs("zero2-fp32", 2)
    for rank, outcome in enumerate(on_two_nodes):
        assert outcome["error"] is None, outcome["traceback"]
        # Rank 0 alone reports.
        assert outcome["context"] == ({"start_step": 0, "world_size": 2} if rank == 0 else {})
        assert outcome["result"] == one["result"]
    for name in ("loss", "load_balance_loss"):
        assert series(on_two_nodes[0], name) == series(one, name)


def test_their_checkpoint_is_the_same(runs: Runs, on_two_nodes):
    want, have = state_of(runs.folder_of("zero2-fp32", 2))[1], state_of(runs.folder / "runs" / "two-nodes")[1]
    assert [key for key in want if not have[key].equal(want[key])] == []
