"""The environment of every test: one thread per process, no network, and a skip for what this machine lacks."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

# Before torch and the Hugging Face libraries are imported, which read these once. The tests already run on several
# processes, and none of them may need a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that asks for more threads shares the cores with the other processes, and a thread that waits in a loop takes
# them from those that it waits for: 6.1 s of processor time for 0.5 s of work on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is measured once per machine: not among the files of the user, and once for all processes.
os.environ.setdefault("QSPARSE_MOE_CACHE", os.path.join(tempfile.gettempdir(), "qsparse_moe-tests"))
# Triton reads it when it is imported: without a GPU its kernels run under its interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has SIGINT ignored, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

# A shared machine is slow at times, and a red test must be red again when it is run again.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")


SHARING_RUNS = tuple(
    f"tests/distributed/test_{name}.py" for name in ("bad_input", "calibrate", "layouts", "nodes", "stream_trouble")
)
"""Files whose tests use the runs of the session in ``tests/distributed``."""


def worker_scope(nodeid: str) -> str:
    """Return what is the same for the tests that one worker runs: their file, or one name for ``SHARING_RUNS``."""
    file = nodeid.partition("::")[0]
    return "runs" if file in SHARING_RUNS else file


# Without pytest-xdist the hook is unknown. Its marks, xdist_group, have no effect under pytest 9.2, whose items keep
# their ids elsewhere than xdist 3.8 writes them.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``, also keep the files together that share what they have started."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    scheduler = LoadFileScheduling(config, log)
    scheduler._split_scope = worker_scope  # type: ignore[method-assign]
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is no CUDA device; torch is imported only for such a test."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Exclude modules and collected tests, millions of objects that stay, from every later search for garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Include them again: libraries report what is left at the end of a process as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _package_log_as_it_was() -> Iterator[None]:
    """Undo what a verb does to the package's loggers: as another rank it would hide messages of later tests."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("qsparse_moe")]
    levels = {name: logging.getLogger(name).level for name in {*names, "qsparse_moe"}}
    yield
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("qsparse_moe"):
            logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
