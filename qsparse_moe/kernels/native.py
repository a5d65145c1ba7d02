"""The C++ operators of this package, compiled once per machine and then loaded from the extension cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from qsparse_moe import locks
from qsparse_moe.errors import BackendUnavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """Operators that are compiled together and loaded at once."""

    name: str
    sources: tuple[str, ...]
    """Relative to this file. File names are unique, because all object files are written to one folder."""
    setting: str
    """What requested it, for messages."""
    way_out: str


OPERATORS = Library(
    "cpu",
    (
        "topk_select/cpu.cpp",
        "fused_glu/fused_glu.cpp",
        "site_sums/site_sums.cpp",
        "combine_rows/combine_rows.cpp",
    ),
    setting="model.sparsity.backend ('native')",
    way_out="model.sparsity.backend=torch needs no compiler",
)
"""The operators of training."""
PRODUCTS = Library(
    "products",
    ("expert_products/expert_products.cpp",),
    setting="model.moe.backend ('native')",
    way_out="model.moe.backend=auto uses another one",
)
"""The products of the experts."""
DECODE = Library(
    "decode",
    ("decode_model/decode_model.cpp",),
    setting="the decode engine ('native')",
    way_out="the engines gather and torch need no compiler",
)
"""The decode engine. It takes as long to compile as all the others, and training never needs it."""

# march=native: the loops over rows are only fast with the widest vectors of this processor. no-trapping-math: the flags
# of floating-point exceptions are never read, and preserving them keeps the compiler from vectorising loops with e^x on
# AVX2 (backward of SwiGLU over 8192 rows of 768 in fp32, one thread of a Zen 3: 37 ms with the flags, 10 ms without).
_FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp")

# Many times the compile time on a busy machine (about 20 s on an idle one).
_TIMEOUT_SECONDS = 900.0


def why_not(device: torch.device) -> str | None:
    """Return the reason why the C++ operators cannot be compiled for ``device``, or None if they can."""
    if device.type != "cpu":
        return f"the C++ operators run on CPUs, the device is {device.type}"
    compiler = os.environ.get("CXX", "c++")
    for program, remedy in ((compiler, "install a C++ compiler such as g++"), ("ninja", "pip install ninja")):
        if shutil.which(program) is None and not _beside_python(program):
            return f"{program} is not found; {remedy}"
    return None


def load(library: Library | None = None) -> None:
    """Load the operators of ``library`` (None: ``OPERATORS``) into ``torch.ops.qsparse_moe``.

    The first call on a machine compiles them (about 20 s).

    If several processes call it at the same time, one compiles and the others wait. No lock is taken once the library
    exists.

    Raises:
        BackendUnavailable: the compiler fails, another process has been compiling for too long, or the library cannot
            be loaded.
    """
    _load(library or OPERATORS)


@cache
def _load(library: Library) -> None:
    file = library_path(library)
    compiled_here = []

    def build(folder: Path) -> Path:
        compiled_here.append(folder)
        return _compile(library, folder)

    try:
        locks.build_once(file, build, timeout=_TIMEOUT_SECONDS, purpose="the C++ operators")
    except locks.LockHeld as held:
        raise BackendUnavailable(
            f"{library.setting}: {held.holder} has been compiling {file} for more than "
            f"{_TIMEOUT_SECONDS / 60:g} minutes; end that process if it hangs. {library.way_out}"
        ) from None
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"{library.setting}: compiling {', '.join(library.sources)} into {file.parent} (TORCH_EXTENSIONS_DIR) "
            f"failed: {str(error)[-800:]}; {library.way_out}"
        ) from error
    if compiled_here:
        # PyTorch loads a library when it compiles it, and refuses to register the same operators from a second file.
        return
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        raise BackendUnavailable(
            f"{library.setting}: {file} cannot be loaded ({error}); remove the file, so that it is compiled again. "
            f"{library.way_out}"
        ) from error


def library_path(library: Library | None = None) -> Path:
    """Return the path of the compiled library, which depends on the machine, environment, flags, and sources."""
    library = library or OPERATORS
    return extensions_folder() / f"{library.name}-{_build_key(library)}.so"


def extensions_folder() -> Path:
    """Return this package's folder in PyTorch's extension cache: ``TORCH_EXTENSIONS_DIR`` or its default location."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    return Path(root) / "qsparse_moe"


def _compile(library: Library, folder: Path) -> Path:
    """Compile the library in an empty ``folder`` of this process, where PyTorch's own lock never blocks."""
    from torch.utils import cpp_extension

    _put_ninja_on_path()
    logger.info("compiling the C++ operators for this machine, once: %s (about 20 s)", library_path(library))
    start = time.monotonic()
    # PyTorch writes this folder into the link command without quotes, which breaks where its path contains a space.
    folder_of_torch = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(folder_of_torch)
    try:
        _compile_sources(library, folder)
    finally:
        cpp_extension.TORCH_LIB_PATH = folder_of_torch
    logger.info("compiled the C++ operators in %.0f s", time.monotonic() - start)
    (built,) = folder.glob("*.so")
    return built


def _compile_sources(library: Library, folder: Path) -> None:
    from torch.utils import cpp_extension

    cpp_extension.load(
        name=f"qsparse_moe_{library.name}",
        sources=[str(path) for path in _source_paths(library)],
        extra_cflags=list(_FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        # Registered by TORCH_LIBRARY, so no Python headers are needed: the first operator compiled in 8 s without them.
        is_python_module=False,
    )


def _source_paths(library: Library) -> list[Path]:
    return [Path(__file__).parent / source for source in library.sources]


def _build_key(library: Library) -> str:
    """Return a digest of everything that determines the binary: processor, environment, flags, and source texts."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    # On a shared folder, the library may be loaded by a machine with an older C library than the one that compiled it.
    parts = [features, torch.__version__, torch.__file__, *platform.libc_ver(), *_FLAGS]
    digest = hashlib.sha256("\n".join(parts).encode())
    # All headers, whichever sources include them: a change of one compiles both libraries again.
    for path in sorted({*_source_paths(library), *Path(__file__).parent.rglob("*.h")}):
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _beside_python(program: str) -> bool:
    return (Path(sys.executable).parent / program).exists()


def _put_ninja_on_path() -> None:
    """Add the folder of the interpreter to PATH: pip installs ninja there, and it may not be activated."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
