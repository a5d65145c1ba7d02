"""Event files as TensorBoard's server reads them: its fast reader has other rules than the Python reader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from qsparse_moe.metrics.names import METRICS
from tests.metrics.recorded import record

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Start a server for one resumed run and yield its address."""
    folder = tmp_path_factory.mktemp("server")
    record(folder, [1, 2, 3], ends=False)
    record(folder, [2, 3], start_step=1)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "tensorboard"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            *_, last = until(process.stderr, " at http://")
            found = re.findall(r"http\S+/", last)[0]
            yield found
        finally:
            process.terminate()


def until(lines, word):
    for line in lines:
        yield line
        if word in line:
            return


def fetch(address, path):
    with urllib.request.urlopen(f"{address}data/plugin/{path}", timeout=30) as answer:
        return json.load(answer)


def fetch_tags(address, plugin):
    """Return the tags of a page by run as soon as the server has read all files."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        runs = {run for run, found in fetch(address, "scalars/tags").items() if found}
        if {".", "cost", "validation"} <= runs and (tags := fetch(address, f"{plugin}/tags")):
            return tags
        time.sleep(0.3)
    raise AssertionError(f"60 s after its start the server knows the runs {runs} only")


@pytest.mark.parametrize("plugin", ["scalars", "images", "histograms"])
def test_every_card_shows_the_unit_and_the_definition(address, plugin):
    units = {metric.unit for metric in METRICS}
    for run, tags in fetch_tags(address, plugin).items():
        for tag, about in tags.items():
            unit = re.match(r"<p><strong>Unit: (.+?)\.</strong> \w", about["description"])
            assert unit and unit[1] in units, (run, tag, about)


def test_validation_is_a_run_of_its_own_and_a_resumed_run_has_each_step_once(address):
    tags = fetch_tags(address, "scalars")
    assert set(tags["validation"]) == {"validation/loss", "validation/perplexity", "validation/bits_per_byte"}
    assert not [tag for run in (".", "cost") for tag in tags[run] if tag.startswith("validation/")]
    for run, tag in (("validation", "validation/loss"), (".", "train/loss")):
        points = fetch(address, f"scalars/scalars?run={run}&tag={tag}")
        assert [step for _, step, _ in points] == [1, 2, 3], tag
