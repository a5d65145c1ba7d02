"""The GPU owner's command, with a stand-in for Python that only writes down how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import qsparse_moe

REPOSITORY = Path(qsparse_moe.__file__).parent.parent
FAKE_PYTHON = """#!/bin/sh
case "$2" in *megablocks*) exit {megablocks} ;; esac
case "$1" in -c) {device} ;; esac
echo "interpret=$TRITON_INTERPRET $*" >>"$CALLS"
{exit}
"""


def launch(
    tmp_path: Path, *, device: str, megablocks: int = 0, exit: str = ""
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(FAKE_PYTHON.format(device=device, megablocks=megablocks, exit=exit))
    python.chmod(0o755)
    calls.touch()
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "TRITON_INTERPRET": "1"}
    command = ["bash", str(REPOSITORY / "launch" / "gpu.sh"), "-x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


def test_tests_run_compiled_and_results_are_named_after_the_device(tmp_path):
    done, calls = launch(tmp_path, device='echo "NVIDIA H200"; exit 0')
    assert done.returncode == 0, done.stderr
    assert calls == [
        "interpret=0 -m pytest -m gpu -x",
        "interpret=0 -m qsparse_moe bench ops --device cuda --output results/gpu/ops-NVIDIA-H200.json",
        "interpret=0 -m qsparse_moe bench moe --device cuda --output results/gpu/moe-NVIDIA-H200.json",
        "interpret=0 -m qsparse_moe bench step --device cuda --precision bf16 --layers 1 --hidden-size 2048 --heads 16 "
        "--experts 64 --experts-per-token 8 --expert-hidden-size 1024 --rows 4 --sequence-length 4096 "
        "--output results/gpu/step-NVIDIA-H200.json",
        "interpret=0 -m qsparse_moe bench decode --device cuda --weights bf16,int8 --sparsity 0.5,0.75 --batch 1,8 "
        "--output results/gpu/decode-NVIDIA-H200.json",
    ]


def test_nothing_is_timed_after_a_red_test(tmp_path):
    done, calls = launch(tmp_path, device="echo GPU; exit 0", exit="exit 1")
    assert done.returncode == 1
    assert calls == ["interpret=0 -m pytest -m gpu -x"]


def test_a_python_without_a_device_is_refused_with_the_way_out(tmp_path):
    done, calls = launch(tmp_path, device="exit 1")
    assert done.returncode == 2 and not calls
    assert "finds no CUDA device; set PYTHON to an interpreter whose torch does" in done.stderr


def test_a_python_without_megablocks_is_refused_with_the_way_out(tmp_path):
    done, calls = launch(tmp_path, device="echo GPU; exit 0", megablocks=1)
    assert done.returncode == 2 and not calls
    assert f"has no megablocks; PYTHON={tmp_path / 'python'} bash launch/megablocks.sh installs it" in done.stderr
