"""Each expert's rows through PyTorch's own product on a CPU, MKL in the usual builds. N rows, X and Y widths."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels import onednn
from qsparse_moe.moe.backends import stacked
from qsparse_moe.moe.permutation import RowCounts

_PRODUCTS = stacked.Products(onednn.torch_gemm)


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: RowCounts) -> Tensor:
    """``(N, Y)``: each expert's rows times its matrix."""
    return stacked.matmul(rows_NX, weights_EXY, counts.as_list, by=_PRODUCTS)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """The reason why it cannot run on ``device``, or None."""
    return (
        None if device.type == "cpu" else f"it is for CPUs, where row counts are at hand; the device is {device.type}"
    )
