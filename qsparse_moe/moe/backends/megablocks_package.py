"""The installed MegaBlocks package: whether it is available, and its import without its CUDA extension."""

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
    """Return the reason why MegaBlocks cannot be imported, with the way out, or None if it can."""
    for module, package in (("megablocks", "megablocks"), ("stk", "stanford-stk")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed; {INSTALL} installs it"
    return None


def has_extension() -> bool:
    """Return whether MegaBlocks' CUDA extension is installed; the replacement in this package does not count."""
    loaded = sys.modules.get(_EXTENSION)
    if loaded is not None:
        # The replacement is registered under this name as well, but has a name of its own.
        return loaded.__name__ == _EXTENSION
    return importlib.util.find_spec(_EXTENSION) is not None


@cache
def load() -> ModuleType:
    """Import the package ``megablocks`` once, with a replacement for its CUDA extension if that is not installed.

    Under Triton's interpreter, where autotuning is pointless, each kernel keeps one configuration.

    Raises:
        BackendUnavailable: it cannot be imported.
    """
    # Imported here, because missing() must work without torch: doctor reports a missing torch as well.
    from qsparse_moe.kernels import tiles

    # Before the import below, because MegaBlocks imports its extension when it is imported.
    if not has_extension():
        sys.modules[_EXTENSION] = import_module(_STAND_IN)
        logger.warning(
            "model.moe.backend=megablocks: %s, the CUDA extension of MegaBlocks, is not installed; PyTorch computes "
            "its sort, histogram, and sums instead. With a CUDA version below 13, %s builds it",
            _EXTENSION,
            INSTALL,
        )
    try:
        with warnings.catch_warnings():
            # Logged below, together with the product that is used instead.
            warnings.filterwarnings("ignore", message="Grouped GEMM not available")
            package = import_module("megablocks")
    except ImportError as error:
        raise BackendUnavailable(
            f"model.moe.backend ('megablocks'): the installed MegaBlocks cannot be imported ({error}); {INSTALL} "
            "reinstalls it for the installed torch"
        ) from error
    if tiles.interpreted():
        _take_one_configuration(package.backend.kernels)
    has_gemm = package.grouped_gemm_util.grouped_gemm_is_available()
    products = "grouped_gemm (bf16 on CUDA; other rows: torch grouped_mm)" if has_gemm else "torch grouped_mm"
    logger.info("model.moe.backend=megablocks: matrix products by %s", products)
    return package


def _take_one_configuration(kernels: ModuleType) -> None:
    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):
            # The widest block needs the fewest operations, which determine the time of the interpreter.
            kernel.configs = [max(kernel.configs, key=lambda config: config.kwargs["BLOCK_X"])]
