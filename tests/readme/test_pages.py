"""What the README names is there, and what is there it names."""

from __future__ import annotations

import re

from tests.readme.blocks import README, REPOSITORY


def test_every_path_it_names_exists():
    named = set(re.findall(r"`((?:qsparse_moe|configs|launch|docs|tests)/[\w./-]*)`", README))
    linked = set(re.findall(r"\]\(((?!http)[^)]+)\)", README))
    assert len(named) >= 15 and len(linked) >= 4
    assert not {path for path in named | linked if not (REPOSITORY / path).exists()}


def test_layout_names_every_room():
    rooms = {path.parent.name for path in (REPOSITORY / "qsparse_moe").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `qsparse_moe/(\w+)/` \|", README, flags=re.MULTILINE)) == rooms


def test_six_files_come_first():
    section = README.split("## Six files to read first")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| `", section, flags=re.MULTILINE)) == 6
