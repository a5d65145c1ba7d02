"""The fast tier of ``launch/test.sh --fast`` is a list of folders, and no folder of tests is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

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
