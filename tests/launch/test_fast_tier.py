"""The tiers of ``launch/test.sh``: the fast one forgets no folder, and distributed tests share what they start."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import SHARING_RUNS, worker_scope

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"
# They train models, serve pages, or start the command line.
INTEGRATION = {
    "ablation",
    "browser",
    "cli",
    "distributed",
    "examples",
    "inference",
    "interop",
    "launch",
    "readme",
    "training",
}


def fast_tier() -> set[str]:
    script = (REPOSITORY / "launch" / "test.sh").read_text(encoding="utf-8")
    listed = re.search(r"^fast_tier=\(([a-z ]+)\)$", script, re.MULTILINE)
    assert listed, "launch/test.sh lists the folders of the fast tier in one line"
    return set(listed[1].split())


def test_every_folder_of_tests_is_in_the_fast_tier_or_known_to_be_slower() -> None:
    folders = {file.parent.relative_to(TESTS).parts[0] for file in TESTS.rglob("test_*.py") if file.parent != TESTS}
    assert fast_tier() | INTEGRATION == folders
    assert not fast_tier() & INTEGRATION


def test_tests_that_share_what_they_start_run_on_one_worker() -> None:
    """Each worker would make the runs of the session otherwise, for minutes."""
    assert worker_scope("tests/a/test_one.py::test_x[1::2]") == "tests/a/test_one.py"
    assert {worker_scope(f"{file}::test_x") for file in SHARING_RUNS} == {"runs"}
    files = (TESTS / "distributed").glob("test_*.py")
    users = [str(file.relative_to(REPOSITORY)) for file in files if "runs: Runs" in file.read_text(encoding="utf-8")]
    assert sorted(users) == list(SHARING_RUNS)
