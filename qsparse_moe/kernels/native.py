"""The C++ operators of this package: compiled once for this machine, then loaded from PyTorch's extension cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path

import torch

from qsparse_moe.errors import BackendUnavailable

# No two of the same name: the object files lie in one folder.
_SOURCES = (
    "topk_select/cpu.cpp",
    "fused_glu/fused_glu.cpp",
    "site_sums/site_sums.cpp",
    "combine_rows/combine_rows.cpp",
)
# native: the row loops are only fast with the widest vectors that this processor has. no-trapping-math: nobody reads
# the flags of floating-point exceptions, and with them in mind the compiler leaves the loops around e^x without vectors
# on AVX2 (SwiGLU's backward over 8192 rows of 768, one thread of a Zen 3: fp32 37 ms with them, 10 ms without).
_FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp")


def why_not(device: torch.device) -> str | None:
    """The reason why the C++ operators cannot be compiled for ``device``, or None."""
    if device.type != "cpu":
        return f"the C++ operators run on CPUs, the device is {device.type}"
    compiler = os.environ.get("CXX", "c++")
    for program, remedy in ((compiler, "install a C++ compiler such as g++"), ("ninja", "pip install ninja")):
        if shutil.which(program) is None and not _beside_python(program):
            return f"{program} is not found; {remedy}"
    return None


@cache
def load() -> None:
    """Make ``torch.ops.qsparse_moe`` hold the operators. The first call on a machine compiles them (about 15 s).

    Processes that call at the same time wait for one of them to compile.

    Raises:
        BackendUnavailable: the compiler fails; with the end of what it said.
    """
    from torch.utils import cpp_extension

    _put_ninja_on_path()
    sources = [str(Path(__file__).parent / source) for source in _SOURCES]
    try:
        cpp_extension.load(
            name=f"qsparse_moe_cpu_{_machine_key()}",
            sources=sources,
            extra_cflags=list(_FLAGS),
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"model.sparsity.backend ('native'): compiling {', '.join(_SOURCES)} failed: {str(error)[-800:]}; "
            "model.sparsity.backend=torch needs no compiler"
        ) from error


def _machine_key() -> str:
    """Tells processors, environments and checkouts apart, which may share the cache folder but not what is in it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    # Two checkouts that shared a folder would compile in turns, each for its own sources.
    environment = f"{torch.__version__} {torch.__file__} {Path(__file__).parent}"
    return hashlib.sha256(f"{features} {environment} {_FLAGS} {_SOURCES}".encode()).hexdigest()[:12]


def _beside_python(program: str) -> bool:
    return (Path(sys.executable).parent / program).exists()


def _put_ninja_on_path() -> None:
    """ninja from pip lies beside the interpreter, which is on the path only in an activated environment."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
