"""Freed memory stays in the process while it trains on a CPU."""

import os
import platform
import subprocess
import sys

import pytest

from qsparse_moe.training import prepare, start
from qsparse_moe.training.freed_memory import keep_freed_memory
from qsparse_moe.training.loop import train

# numpy asks malloc as torch does, and is imported in a tenth of the time.
FAULTS = """
import resource, sys
import numpy
from qsparse_moe.training.freed_memory import keep_freed_memory

def use_and_free():
    blocks = [numpy.empty(1 << 20) for _ in range(24)]
    for block in blocks:
        block.fill(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use_and_free()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    print(keep_freed_memory())
use_and_free()
use_and_free()
print(faults())
"""


def measure(*arguments, **variables):
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    command = [sys.executable, "-c", FAULTS, *arguments]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    return found.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_pages_that_were_freed_are_not_requested_again():
    # 24 blocks of 8 MiB are 49,152 pages of 4 kB.
    (before,) = measure("leave")
    kept, after = measure("keep")
    assert kept == "True" and int(after) < 500 < 5_000 < int(before)


def test_settings_of_the_environment_are_left_alone():
    kept, faults = measure("keep", MALLOC_TRIM_THRESHOLD_="100000")
    assert kept == "False" and (platform.libc_ver()[0] != "glibc" or int(faults) > 5_000)


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


def test_it_begins_once_the_engine_is_built(make_config, monkeypatch):
    events = []
    build = start.build_engine

    def note(*arguments, **more):
        engine = build(*arguments, **more)
        events.append("built")
        return engine

    monkeypatch.setattr(start, "build_engine", note)
    monkeypatch.setattr(prepare, "keep_freed_memory", lambda: events.append("kept"))
    train(make_config(steps=2), [lambda report: events.append(report.step)])
    assert events == ["built", "kept", 1, 2]
