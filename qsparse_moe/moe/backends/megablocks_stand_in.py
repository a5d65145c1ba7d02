"""What this package uses of ``megablocks_ops``, MegaBlocks' CUDA extension, in stock PyTorch on any device.

The module takes the extension's place where that is not installed. It waits for no device, and its results are the
extension's: a stable sort, counts, sums.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from qsparse_moe.errors import BackendUnavailable


def sort(x_N: Tensor, end_bit: int, values_N: Tensor, order_N: Tensor) -> None:
    """Write the sorted values and their places before the sort; equal values keep their order.

    ``end_bit``: the extension sorts by that many low bits. The caller gives as many as the values have.
    """
    values, order = x_N.sort(stable=True)
    values_N.copy_(values)
    order_N.copy_(order)


def histogram(x_N: Tensor, num_bins: int) -> Tensor:
    """``(num_bins,)`` int32: how often each of 0 .. num_bins - 1 occurs."""
    # Not bincount, which looks for the largest value on the host.
    index_N = x_N.long()
    counts = torch.zeros(num_bins, dtype=torch.int32, device=x_N.device)
    return counts.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.int32))


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the running sums along ``dim``."""
    torch.cumsum(x, dim, dtype=x.dtype, out=out)


def __getattr__(name: str) -> NoReturn:
    # Python asks modules for names such as __path__ and takes an AttributeError for no.
    if name.startswith("__"):
        raise AttributeError(name)
    raise BackendUnavailable(
        f"model.moe.backend ('megablocks'): nothing stands in for {name} of MegaBlocks' CUDA extension, as only its "
        "block-sparse layers and its expert parallelism use it; bash launch/megablocks.sh builds the extension where "
        "CUDA is older than 13"
    )
