"""The C++ operators of this package: compiled once for this machine, then loaded from the extension cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import torch

from qsparse_moe import locks
from qsparse_moe.errors import BackendUnavailable

logger = logging.getLogger(__name__)

# No two of the same name: the object files lie in one folder.
_SOURCES = (
    "topk_select/cpu.cpp",
    "fused_glu/fused_glu.cpp",
    "site_sums/site_sums.cpp",
    "combine_rows/combine_rows.cpp",
    "decode_model/decode_model.cpp",
)
# native: the row loops are only fast with the widest vectors that this processor has. no-trapping-math: nobody reads
# the flags of floating-point exceptions, and with them in mind the compiler leaves the loops around e^x without vectors
# on AVX2 (SwiGLU's backward over 8192 rows of 768, one thread of a Zen 3: fp32 37 ms with them, 10 ms without).
_FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp")

# Many times what a busy machine takes.
_TIMEOUT_SECONDS = 900.0
_WAY_OUT = "model.sparsity.backend=torch needs no compiler"


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
    """Make ``torch.ops.qsparse_moe`` hold the operators. The first call on a machine compiles them (about 20 s).

    Processes that call at the same time wait for one of them to compile. Where the library is there, nothing is locked.

    Raises:
        BackendUnavailable: the compiler fails, with the end of what it said; another process compiles without an end;
            or the library cannot be loaded.
    """
    library = library_path()
    compiled_here = []

    def build(folder: Path) -> Path:
        compiled_here.append(folder)
        return _compile(folder)

    try:
        locks.build_once(library, build, timeout=_TIMEOUT_SECONDS, purpose="the C++ operators")
    except locks.LockHeld as held:
        raise BackendUnavailable(
            f"model.sparsity.backend ('native'): {held.holder} has been compiling {library} for more than "
            f"{_TIMEOUT_SECONDS / 60:g} minutes; end that process if it hangs. {_WAY_OUT}"
        ) from None
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"model.sparsity.backend ('native'): compiling {', '.join(_SOURCES)} failed: {str(error)[-800:]}; "
            f"{_WAY_OUT}"
        ) from error
    if compiled_here:  # PyTorch has loaded what it compiled, and refuses the same operators from a second file
        return
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BackendUnavailable(
            f"model.sparsity.backend ('native'): {library} cannot be loaded ({error}); remove the file, and it is "
            f"compiled again. {_WAY_OUT}"
        ) from error


def library_path() -> Path:
    """Where the compiled operators are kept: another file for every machine, environment, flag and source text."""
    return extensions_folder() / f"cpu-{_build_key()}.so"


def extensions_folder() -> Path:
    """The folder of PyTorch's extension cache that is this package's own: ``TORCH_EXTENSIONS_DIR``, or its default."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    return Path(root) / "qsparse_moe"


def _compile(folder: Path) -> Path:
    """Compile the library in an empty ``folder`` of this process alone, where PyTorch's own lock meets nobody."""
    from torch.utils import cpp_extension

    _put_ninja_on_path()
    logger.info("compiling the C++ operators for this machine, once: %s (about 20 s)", library_path())
    start = time.monotonic()
    cpp_extension.load(
        name="qsparse_moe_cpu",
        sources=[str(path) for path in _source_paths()],
        extra_cflags=list(_FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        is_python_module=False,
    )
    logger.info("compiled the C++ operators in %.0f s", time.monotonic() - start)
    (built,) = folder.glob("*.so")
    return built


def _source_paths() -> list[Path]:
    return [Path(__file__).parent / source for source in _SOURCES]


def _build_key() -> str:
    """A digest of all that decides what is compiled: processor, environment, flags, and the text of every source."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    # A folder that machines share may be read by one whose C library is older than that of the compiler.
    parts = [features, torch.__version__, torch.__file__, *platform.libc_ver(), *_FLAGS]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in sorted({*_source_paths(), *Path(__file__).parent.rglob("*.h")}):
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _beside_python(program: str) -> bool:
    return (Path(sys.executable).parent / program).exists()


def _put_ninja_on_path() -> None:
    """ninja from pip lies beside the interpreter, which is on the path only in an activated environment."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
