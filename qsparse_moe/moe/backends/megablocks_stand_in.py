"""The functions of ``megablocks_ops``, MegaBlocks' CUDA extension, that this package uses, in stock PyTorch.

This module replaces the extension if it is not installed. Its results are the same: a stable sort, counts, and sums. It
runs on any device and does not wait for it.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from qsparse_moe.errors import BackendUnavailable


def sort(x_N: Tensor, end_bit: int, values_N: Tensor, order_N: Tensor) -> None:
    """Write the sorted values and their positions before the sort; equal values keep their order.

    ``end_bit`` is the number of low bits by which the extension sorts. It is ignored here, because callers pass the
    number of bits of the values.
    """
    values, order = x_N.sort(stable=True)
    values_N.copy_(values)
    order_N.copy_(order)


def histogram(x_N: Tensor, num_bins: int) -> Tensor:
    """Return ``(num_bins,)`` int32: the number of occurrences of each of 0 to num_bins - 1."""
    # bincount would copy the largest value to the host.
    index_N = x_N.long()
    counts = torch.zeros(num_bins, dtype=torch.int32, device=x_N.device)
    return counts.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.int32))


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the cumulative sums along ``dim``."""
    torch.cumsum(x, dim, dtype=x.dtype, out=out)


def __getattr__(name: str) -> NoReturn:
    # Python looks up names such as __path__ on modules and expects an AttributeError.
    if name.startswith("__"):
        raise AttributeError(name)
    raise BackendUnavailable(
        f"model.moe.backend ('megablocks'): there is no replacement for {name} of MegaBlocks' CUDA extension, which "
        "only its block-sparse layers and its expert parallelism use; with a CUDA version below 13, "
        "bash launch/megablocks.sh builds the extension"
    )
