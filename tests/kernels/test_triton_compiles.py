"""The Triton kernels compile for NVIDIA GPUs, on any machine, which the interpreter cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qsparse_moe
from qsparse_moe.kernels.registry import OPS

REPOSITORY = Path(qsparse_moe.__file__).parent.parent


@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_and_hopper(tmp_path):
    # A process of its own: the one of the tests has imported Triton to interpret.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for compiled in json.loads(done.stdout).values():
        operations = {spec.name for spec in OPS if "triton" in spec.fast} | {"row_product"}
        assert {name.split()[0] for name in compiled} == operations
        assert all(size > 1000 for kernels in compiled.values() for size, _ in kernels.values())
        fused = {name.split()[0] for name, kernels in compiled.items() if any(count for _, count in kernels.values())}
        assert "fused_glu" in fused, "else nothing is seen of it"
        assert "int8_fake_quantize" not in fused, "a product that is not rounded falls on the other side of a half"
