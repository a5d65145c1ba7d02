"""The library of the C++ operators: compiled once, complete or absent, and not blocked by a process that died."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qsparse_moe import locks
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import native

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")

LOAD = """
import logging, sys
from pathlib import Path
from qsparse_moe.kernels import native
logging.basicConfig(level="INFO", format="%(message)s")
import dataclasses
native.OPERATORS = dataclasses.replace(native.OPERATORS, sources=(sys.argv[1],))
native.load()
print("loaded")
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source that compiles in a second, and an extension cache of the test's own."""
    file = tmp_path / "tiny.cpp"
    file.write_text('extern "C" int tiny() { return 1; }\n')
    monkeypatch.setattr(native, "OPERATORS", replace(native.OPERATORS, sources=(str(file),)))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return file


def load_in_new_process(source: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(source)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def cached() -> list[str]:
    return sorted(path.suffix for path in native.extensions_folder().iterdir())


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.slow
@needs_compiler
def test_process_killed_while_it_compiles_does_not_block_others(source, tmp_path):
    compiler = tmp_path / "slow-compiler"
    real = os.environ.get("CXX", "c++")
    # It answers who it is, and never ends with a source.
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *tiny*) sleep 600;; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    killed = load_in_new_process(source, CXX=str(compiler))
    folder = native.extensions_folder()
    wait_until(lambda: folder.is_dir() and list(folder.glob("*.partial-*/build.ninja")))
    waits = load_in_new_process(source)
    time.sleep(1.0)
    os.killpg(killed.pid, signal.SIGKILL)
    said_by_killed = killed.communicate()[0]
    said = waits.communicate(timeout=120)[0]
    assert waits.returncode == 0 and said.endswith("loaded\n"), said
    assert said_by_killed.startswith("compiling the C++ operators for this machine, once: ")
    assert "compiled the C++ operators in " in said
    assert cached() == [".so"]
    again = load_in_new_process(source, CXX=str(compiler))
    assert again.communicate(timeout=60)[0] == "loaded\n"


@needs_compiler
def test_existing_library_is_loaded_although_its_lock_is_held(source):
    assert load_in_new_process(source).communicate(timeout=120)[0].endswith("loaded\n")
    library = native.library_path()
    with locks.acquire_lock(library.with_name(f"{library.name}.lock")):
        native._load.__wrapped__(native.OPERATORS)


def test_process_that_never_finishes_compiling_is_named(source, monkeypatch, caplog):
    monkeypatch.setattr(native, "_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(locks, "_FIRST_NOTICE_SECONDS", 0.1)
    library = native.library_path()
    library.parent.mkdir(parents=True)
    with (
        locks.acquire_lock(library.with_name(f"{library.name}.lock")),
        caplog.at_level(logging.INFO),
        pytest.raises(BackendUnavailable) as refused,
    ):
        native._load.__wrapped__(native.OPERATORS)
    message = str(refused.value)
    assert f"process {os.getpid()} on " in message and f"has been compiling {library} for more than" in message
    assert "end that process if it hangs. model.sparsity.backend=torch needs no compiler" in message
    assert "waiting for the C++ operators, held by process " in caplog.text


@needs_compiler
def test_source_that_does_not_compile_is_a_clear_error(source):
    source.write_text("this is not C++;")
    with pytest.raises(
        BackendUnavailable,
        match=r"(?s)tiny.cpp into .* \(TORCH_EXTENSIONS_DIR\) failed: .*model.sparsity.backend=torch needs no compiler",
    ):
        native._load.__wrapped__(native.OPERATORS)
    assert cached() == []


def test_the_folder_of_pytorch_may_contain_a_space(source, monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    seen = []

    def link(**settings):
        seen.append(shlex.split(f"-L{cpp_extension.TORCH_LIB_PATH} -lc10"))  # as PyTorch puts it into a command
        Path(settings["build_directory"], "built.so").touch()

    monkeypatch.setattr(cpp_extension, "load", link)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", "/a folder/lib")
    native._compile(native.OPERATORS, tmp_path)
    assert seen == [["-L/a folder/lib", "-lc10"]] and cpp_extension.TORCH_LIB_PATH == "/a folder/lib"


def test_library_that_is_damaged_is_named(source):
    library = native.library_path()
    library.parent.mkdir(parents=True)
    library.write_bytes(b"half a library")
    with pytest.raises(
        BackendUnavailable, match=r"\.so cannot be loaded \(.*\); remove the file.*model.sparsity.backend=torch"
    ):
        native._load.__wrapped__(native.OPERATORS)


@pytest.mark.parametrize("edited", ["topk_select/cpu.cpp", "storage_types.h", "topk_select/select_row.h"])
def test_library_is_another_one_when_a_source_or_a_header_changes(tmp_path, monkeypatch, edited):
    here = native.library_path().name
    kernels = tmp_path / "kernels"
    shutil.copytree(Path(native.__file__).parent, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(native, "__file__", str(kernels / "native.py"))
    assert native.library_path().name == here, "two checkouts of one text share it"
    file = kernels / edited
    file.write_text(file.read_text() + "\n// another text\n")
    assert native.library_path().name != here


def test_library_is_another_one_for_other_flags_or_another_torch(monkeypatch):
    here = native.library_path().name
    with monkeypatch.context() as changed:
        changed.setattr(native, "_FLAGS", (*native._FLAGS, "-g"))
        assert native.library_path().name != here
    monkeypatch.setattr(native.torch, "__version__", "2.99")
    assert native.library_path().name != here
