"""Each expert's rows through oneDNN on a CPU, in row counts that recur. N rows, X and Y widths, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels import onednn
from qsparse_moe.moe.backends import stacked
from qsparse_moe.moe.permutation import RowCounts

# oneDNN compiles a kernel for every shape it meets. Loads differ at every step, so exact counts keep compiling:
# 128 rows, 512 x 768, bf16: 0.27 ms a product once compiled, 0.7 ms the first time. Rounded up to 16 they recur.
_PRODUCTS = stacked.Products(onednn.gemm, round_to=16)


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: RowCounts) -> Tensor:
    """``(N, Y)``: each expert's rows times its matrix."""
    return stacked.matmul(rows_NX, weights_EXY, counts.as_list, by=_PRODUCTS)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """The reason why it cannot run on ``device``, or None."""
    return onednn.why_not(device)
