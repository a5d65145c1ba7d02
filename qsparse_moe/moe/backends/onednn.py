"""Backend ``onednn``: one product per expert by oneDNN on a CPU, in row counts that recur. N rows, X and Y widths."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels import onednn
from qsparse_moe.moe.backends import stacked
from qsparse_moe.moe.permutation import TokenCounts

# oneDNN compiles a kernel for every new shape, and the row counts of experts differ from step to step. A product of 128
# rows with 512 x 768 in bf16 takes 0.27 ms once compiled and 0.7 ms the first time. Rounded up to 16, counts recur.
_PRODUCTS = stacked.Products(onednn.gemm, round_to=16)


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: TokenCounts) -> Tensor:
    """Return ``(N, Y)``: the rows of each expert times its matrix."""
    return stacked.matmul(rows_NX, weights_EXY, counts.as_list, by=_PRODUCTS)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """Return the reason why this backend cannot run on ``device``, or None if it can."""
    return onednn.why_not(device)
