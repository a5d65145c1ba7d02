"""The lock of DeepSpeed's operators, with PyTorch's compilation of a tiny source instead of theirs."""

from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch
from torch.utils import cpp_extension

from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.locks import acquire_lock
from qsparse_moe.training.engines import extension_builds
from qsparse_moe.training.engines.extension_builds import locked_builds

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")


@pytest.fixture
def compile_tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    source = tmp_path / "tiny.cpp"
    source.write_text('extern "C" int tiny() { return 1; }\n')
    with locked_builds():
        yield lambda: cpp_extension.load(name="async_io", sources=[str(source)], is_python_module=False)


def test_stale_lock_of_a_dead_process_is_taken_over(compile_tiny, tmp_path, caplog):
    folder = tmp_path / "extensions" / "qsparse_moe" / "deepspeed" / "async_io"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    with caplog.at_level(logging.INFO):
        compile_tiny()
    assert "compiling DeepSpeed's async_io once" in caplog.text and str(folder) in caplog.text
    assert (folder / "async_io.so").exists() and not (folder / "lock").exists()


def test_process_that_never_finishes_its_compilation_is_named(compile_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(extension_builds, "_TIMEOUT_SECONDS", 0.2)
    folder = tmp_path / "extensions" / "qsparse_moe" / "deepspeed" / "async_io"
    folder.mkdir(parents=True)
    message = rf"process {os.getpid()} on .* has been compiling DeepSpeed's async_io .*or offload to cpu"
    with acquire_lock(folder / "lock"), pytest.raises(BackendUnavailable, match=message):
        compile_tiny()


def test_patched_functions_are_restored_afterwards(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    baton = cpp_extension.FileBaton
    with locked_builds():
        assert cpp_extension.FileBaton is extension_builds.BuildLock
        assert os.environ["TORCH_EXTENSIONS_DIR"].endswith("qsparse_moe/deepspeed")
    assert cpp_extension.FileBaton is baton and "TORCH_EXTENSIONS_DIR" not in os.environ


def test_deepspeed_sets_itself_up_under_these_locks(make_config, monkeypatch):
    """``deepspeed.initialize`` calls the builders of operators."""
    deepspeed = pytest.importorskip("deepspeed")
    from qsparse_moe.training.loop import train

    seen = []
    initialize = deepspeed.initialize

    def record_the_lock(**given):
        seen.append(cpp_extension.FileBaton)
        return initialize(**given)

    monkeypatch.setattr(deepspeed, "initialize", record_the_lock)
    train(make_config(engine="deepspeed", steps=1, warmup_steps=0))
    assert seen == [extension_builds.BuildLock]
    assert torch.distributed.is_initialized() is False
