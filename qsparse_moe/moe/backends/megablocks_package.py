"""The installed MegaBlocks: whether it is there, and how it is imported where a part of it is not."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

from qsparse_moe.errors import BackendUnavailable

logger = logging.getLogger(__name__)
INSTALL = "bash launch/megablocks.sh"
_EXTENSION = "megablocks_ops"
_STAND_IN = "qsparse_moe.moe.backends.megablocks_stand_in"


def missing() -> str | None:
    """What keeps MegaBlocks from being imported, with the way out, or None."""
    for module, package in (("megablocks", "megablocks"), ("stk", "stanford-stk")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed; {INSTALL} installs it"
    return None


def has_extension() -> bool:
    """Whether its CUDA extension is installed; what stands in for it does not count."""
    loaded = sys.modules.get(_EXTENSION)
    if loaded is not None:
        return loaded.__name__ == _EXTENSION
    return importlib.util.find_spec(_EXTENSION) is not None


@cache
def load() -> ModuleType:
    """The package ``megablocks``, imported once; with a stand-in for its CUDA extension where that is not installed.

    Under Triton's interpreter, where there is nothing to time, each of its kernels keeps one configuration.

    Raises:
        BackendUnavailable: it cannot be imported.
    """
    # Here, so that what is missing can be told where torch is missing too.
    from qsparse_moe.kernels import tiles

    if not has_extension():
        sys.modules[_EXTENSION] = import_module(_STAND_IN)
        logger.warning(
            "model.moe.backend=megablocks: PyTorch stands in for sort, histogram and sums of %s, MegaBlocks' CUDA "
            "extension, which is not installed; %s builds it where CUDA is older than 13",
            _EXTENSION,
            INSTALL,
        )
    try:
        with warnings.catch_warnings():
            # Said below, with what takes its place.
            warnings.filterwarnings("ignore", message="Grouped GEMM not available")
            package = import_module("megablocks")
    except ImportError as error:
        raise BackendUnavailable(
            f"model.moe.backend ('megablocks'): the installed MegaBlocks cannot be imported ({error}); {INSTALL} "
            "installs it again, for the torch that is there"
        ) from error
    if tiles.interpreted():
        _take_one_configuration(package.backend.kernels)
    has_gemm = package.grouped_gemm_util.grouped_gemm_is_available()
    products = "grouped_gemm (bf16 on CUDA; other rows: torch grouped_mm)" if has_gemm else "torch grouped_mm"
    logger.info("model.moe.backend=megablocks multiplies by %s", products)
    return package


def _take_one_configuration(kernels: ModuleType) -> None:
    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):
            # The widest block: the interpreter's time goes by the number of operations.
            kernel.configs = [max(kernel.configs, key=lambda config: config.kwargs["BLOCK_X"])]
