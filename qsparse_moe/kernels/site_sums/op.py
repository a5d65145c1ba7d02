"""The row sums and the pattern of a site, by stock PyTorch or by the C++ operators. N rows, D features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparse_moe.kernels import native
from qsparse_moe.sparsity.stats import Readers, RowPattern, RowSums, row_pattern, row_sums


@dataclass(frozen=True)
class SiteSums:
    """A named implementation of ``row_sums(before_ND, after_ND)`` and ``row_pattern(after_ND, readers)``."""

    name: str
    row_sums: Callable[[Tensor, Tensor], RowSums]
    row_pattern: Callable[[Tensor, Readers], RowPattern]


def row_sums_native(before_ND: Tensor, after_ND: Tensor) -> RowSums:
    """Compute ``row_sums`` with the C++ operators on a CPU."""
    native.load()
    # The operators read whole rows one after the other and ignore strides.
    before_ND, after_ND = before_ND.detach().contiguous(), after_ND.detach().contiguous()
    return RowSums(*torch.ops.qsparse_moe.site_row_sums(before_ND, after_ND))


def row_pattern_native(after_ND: Tensor, readers: Readers) -> RowPattern:
    """Compute ``row_pattern`` with the C++ operators on a CPU."""
    native.load()
    (smallest_N, common_N), used_ED = torch.ops.qsparse_moe.site_row_pattern(
        after_ND.detach().contiguous(), readers.row_R, readers.expert_R, readers.num_experts
    )
    return RowPattern(smallest_N, common_N, used_ED)


NATIVE = SiteSums("native", row_sums_native, row_pattern_native)
TORCH = SiteSums("torch", row_sums, row_pattern)
