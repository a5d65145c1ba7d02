"""Backend ``blas``: one product per expert by PyTorch on a CPU, MKL in the usual builds. N rows, X and Y widths."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels import onednn
from qsparse_moe.moe.backends import stacked
from qsparse_moe.moe.permutation import TokenCounts

_PRODUCTS = stacked.Products(onednn.torch_gemm)


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: TokenCounts) -> Tensor:
    """Return ``(N, Y)``: the rows of each expert times its matrix."""
    return stacked.matmul(rows_NX, weights_EXY, counts.as_list, by=_PRODUCTS)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """Return the reason why this backend cannot run on ``device``, or None if it can."""
    if device.type == "cpu":
        return None
    return f"it runs on CPUs only, where reading the row counts is free; the device is {device.type}"
