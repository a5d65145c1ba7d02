"""The checks of ``doctor``. A missing package or device is a finding, never an error."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.backends.megablocks_package import INSTALL, has_extension

if TYPE_CHECKING:
    import torch

# The lowest versions of pyproject.toml (a test compares them) of the packages that every run imports.
NEEDED_PACKAGES = {
    "torch": "2.10",
    "deepspeed": "0.19.8",
    "datasets": "4.0",
    "tokenizers": "0.21",
    "einops": "0.8",
    "numpy": "1.26",
    "tensorboard": "2.21",
    "matplotlib": "3.9",
    "ninja": "1.11",
}
EXTRA_PACKAGES = {"transformers": "hf", "safetensors": "hf", "scipy": "ablation"}
_PYTHON = (3, 11)
# PyTorch's builder of extensions calls c++ unless the variable CXX names another compiler, so it comes first.
_COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Finding:
    """One finding: whether it works, whether every run needs it, and its version or how to install it."""

    group: str
    name: str
    runs: bool
    needed: bool
    detail: str


def examine() -> list[Finding]:
    """Return all findings, group by group."""
    findings = [_python(), *_needed_packages(), _compiler()]
    # The checks of machine and backends import these packages, and a missing one is a finding, not an error.
    if all(finding.runs for finding in findings if finding.name in {"torch", "einops", "numpy"}):
        findings += [*_machine(), *_backends()]
    return [*findings, *_gpu_libraries(), *_extras()]


def _python() -> Finding:
    version, wanted = platform.python_version(), ".".join(map(str, _PYTHON))
    runs = sys.version_info >= _PYTHON
    return Finding("needed", "python", runs, True, version if runs else f"{version}; install Python {wanted} or newer")


def _needed_packages() -> Iterator[Finding]:
    for package, minimum in NEEDED_PACKAGES.items():
        version = installed_version(package)
        if version is None:
            yield Finding("needed", package, False, True, f'not installed; pip install "{package}>={minimum}"')
        elif _numbers(version) < _numbers(minimum):
            detail = f'{version} is older than {minimum}; pip install "{package}>={minimum}"'
            yield Finding("needed", package, False, True, detail)
        else:
            yield Finding("needed", package, True, True, version)


def _compiler() -> Finding:
    for compiler in _COMPILERS:
        path = shutil.which(compiler)
        if path is not None:
            return Finding("needed", "C++ compiler", True, True, path)
    detail = "not found; DeepSpeed compiles with it at first use: install g++ (Debian, Ubuntu: apt install g++)"
    return Finding("needed", "C++ compiler", False, True, detail)


def _machine() -> Iterator[Finding]:
    import torch

    from qsparse_moe.training.distributed.ranks import num_cores

    detail = f"{platform.machine()}, {num_cores()} cores, torch uses {torch.get_num_threads()} threads per process"
    yield Finding("machine", "CPU", True, False, detail)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("machine", "CUDA", True, False, f"CUDA {torch.version.cuda}: {', '.join(names)}")
    else:
        build = f"built for CUDA {torch.version.cuda}, but finds no device" if torch.version.cuda else "a CPU build"
        yield Finding("machine", "CUDA", False, False, f"torch {torch.__version__} is {build}")


def _backends() -> Iterator[Finding]:
    """Check each implementation of experts and selection on each kind of device present, for the default model."""
    import torch

    from qsparse_moe.config.shapes import head_size
    from qsparse_moe.kernels.topk_select.op import TOPK_SELECTS
    from qsparse_moe.model.document_attention import DOCUMENT_BACKENDS
    from qsparse_moe.moe.backends.registry import BACKENDS

    for device in _devices(torch.cuda.is_available()):
        for backend in BACKENDS:
            reason = backend.why_not(ModelConfig(), device)
            yield _on_device(f"model.moe.backend={backend.name}", device, reason)
        for attention in DOCUMENT_BACKENDS:
            reason = attention.why_not(device, None, head_size(ModelConfig()))
            yield _on_device(f"model.attention_backend={attention.name}", device, reason)
        for selection in TOPK_SELECTS:
            yield _on_device(f"model.sparsity.backend={selection.name}", device, selection.why_not(device))


def _devices(has_cuda: bool) -> list[torch.device]:
    import torch

    return [torch.device(kind) for kind in (("cpu", "cuda") if has_cuda else ("cpu",))]


def _on_device(name: str, device: torch.device, reason: str | None) -> Finding:
    return Finding(f"on {device.type}", name, reason is None, False, reason or "")


def _gpu_libraries() -> Iterator[Finding]:
    yield _module("triton", 'not installed; pip install "qsparse-moe[gpu]" on a machine with a GPU')
    yield _module("megablocks", f"not installed; {INSTALL} installs it for the installed torch")
    yield _module("stk", f"not installed; megablocks imports it: {INSTALL}", package="stanford-stk")
    stand_in = f"not installed; PyTorch is used instead. {INSTALL} compiles it for CUDA older than 13"
    detail = "MegaBlocks' CUDA extension" if has_extension() else f"MegaBlocks' CUDA extension is {stand_in}"
    yield Finding("GPU libraries", "megablocks_ops", has_extension(), False, detail)
    # It compiles for minutes and needs a GPU to be of use, so the script builds it only on request.
    in_its_place = "not installed; torch's grouped_mm is used instead"
    yield _module(
        "grouped_gemm", f"{in_its_place}. GROUPED_GEMM=1 {INSTALL} compiles it on a machine with an NVIDIA GPU"
    )


def _module(name: str, missing: str, *, package: str | None = None) -> Finding:
    # The package is not imported, because importing megablocks without its compiled extension fails.
    found = importlib.util.find_spec(name) is not None
    version = installed_version(package or name) or "installed"
    return Finding("GPU libraries", package or name, found, False, version if found else missing)


def _extras() -> Iterator[Finding]:
    for package, extra in EXTRA_PACKAGES.items():
        version = installed_version(package)
        detail = version or f'not installed; pip install "qsparse-moe[{extra}]"'
        yield Finding("extras", package, version is not None, False, detail)


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 13, 0) for ``2.13.0+cpu``."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])
