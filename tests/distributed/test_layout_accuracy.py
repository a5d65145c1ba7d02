"""Counted memory and bytes against runs on two ranks; ``layout_accuracy.py`` compares all cases."""

from __future__ import annotations

import pytest

from tests.distributed.layout_accuracy import compare

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NAMES = ["zero1-fp32", "zero2-bf16-ep2", "zero3-fp32"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return {one.name: one for one in compare(tmp_path_factory.mktemp("layouts"), 2, NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_counted_within_a_tenth(found, name):
    assert abs(found[name].memory_error) < 0.1, found[name]


@pytest.mark.parametrize("name", NAMES)
def test_sent_bytes_are_counted_within_a_twentieth(found, name):
    assert abs(found[name].sent_error) < 0.05, found[name]
