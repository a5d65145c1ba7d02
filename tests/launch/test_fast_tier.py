"""The tiers of ``launch/test.sh``: the fast one forgets no folder, and distributed tests share what they start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems

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


class Collected:
    """A collected test, as far as the hook of ``tests/conftest.py`` reads it."""

    def __init__(self, nodeid: str, *marks: Any) -> None:
        self.nodeid, self.marks = nodeid, [mark.mark for mark in marks]

    def get_closest_marker(self, name: str) -> Any:
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark: Any) -> None:
        self.marks.append(mark.mark)


def test_distributed_tests_of_a_file_are_a_group_unless_several_files_are_one() -> None:
    distributed, joined = pytest.mark.distributed, pytest.mark.xdist_group("runs")
    items: list[Any] = [
        Collected("tests/a/test_one.py::test_x[1::2]", distributed),
        Collected("tests/a/test_two.py::test_x", distributed, joined),
        Collected("tests/a/test_two.py::test_y"),
    ]
    pytest_collection_modifyitems(items)
    groups = [item.get_closest_marker("xdist_group") for item in items]
    assert [group and group.args for group in groups] == [("tests/a/test_one.py",), ("runs",), None]


def test_files_that_use_the_runs_of_the_session_are_one_group() -> None:
    """Each worker would make the runs otherwise, for minutes."""
    texts = {file.name: file.read_text(encoding="utf-8") for file in (TESTS / "distributed").glob("test_*.py")}
    users = {name for name, text in texts.items() if "runs: Runs" in text}
    joined = {name for name, text in texts.items() if 'xdist_group("runs")' in text}
    assert users == joined and len(users) > 2
