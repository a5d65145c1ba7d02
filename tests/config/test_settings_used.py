"""Every setting has a use: a shipped configuration sets it, or a test of behaviour does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from qsparse_moe.config.fields import all_settings

REPOSITORY = Path(__file__).parents[2]
SETTINGS = [path for path, _ in all_settings() if not path.endswith(".N")]


def leaves(value: object, path: str = "") -> Iterator[str]:
    """The dotted path of every value of a YAML file, ``N`` for an index; also those of dotted keys, as grids have."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for item in value:
            yield from leaves(item, f"{path}.N")
    yield path


@cache
def set_in_configs() -> str:
    files = [*(REPOSITORY / "configs").rglob("*.yaml"), *(REPOSITORY / "examples").rglob("*.yaml")]
    return "\n".join(path for file in files for path in leaves(yaml.safe_load(file.read_text(encoding="utf-8"))))


@cache
def text_of_behaviour_tests() -> str:
    """Return the tests outside of this folder, whose tests only check whether a value is accepted."""
    tests = REPOSITORY / "tests"
    files = [file for file in tests.rglob("*.py") if file.relative_to(tests).parts[0] != "config"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def is_used(path: str) -> bool:
    name = path.rsplit(".", 1)[-1]
    in_configs = re.search(rf"(^|\.){re.escape(path)}$", set_in_configs(), re.MULTILINE)
    in_tests = re.search(rf"\b{name}[\"']?\s*[=:]", text_of_behaviour_tests())
    return bool(in_configs or in_tests)


@pytest.mark.parametrize("path", SETTINGS)
def test_setting_is_set_by_a_shipped_config_or_a_test_of_behaviour(path):
    assert is_used(path), f"nothing sets {path}: remove it, or test what it changes"


def test_a_setting_that_nothing_uses_is_reported():
    assert not is_used("data.shuffle_barrel")
