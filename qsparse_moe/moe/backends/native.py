"""Backend ``native``: all experts in one call of a C++ operator on a CPU. N rows, X and Y widths."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.kernels import native
from qsparse_moe.kernels.expert_products.op import expert_products
from qsparse_moe.moe.backends import blas
from qsparse_moe.moe.backends.gathered_sizes import expert_sizes, ramps
from qsparse_moe.moe.permutation import TokenCounts


def matmul(rows_NX: Tensor, weights_EXY: Tensor, counts: TokenCounts) -> Tensor:
    """Return ``(N, Y)``: the rows of each expert times its matrix, in fp64 by the backend ``blas``."""
    if rows_NX.dtype == torch.float64:
        return blas.matmul(rows_NX, weights_EXY, counts)
    return expert_products(rows_NX, weights_EXY, counts_E=counts.on_host)[0]


def matmul_pair(rows_NX: Tensor, first_EXY: Tensor, second_EXY: Tensor, counts: TokenCounts) -> tuple[Tensor, Tensor]:
    """Return two products of the same rows, whose gradient is one sum that never exists in parts."""
    if rows_NX.dtype == torch.float64:
        return blas.matmul(rows_NX, first_EXY, counts), blas.matmul(rows_NX, second_EXY, counts)
    first_NY, second_NY = expert_products(rows_NX, first_EXY, second_EXY, counts_E=counts.on_host)
    return first_NY, second_NY


def load() -> None:
    """Compile the operators, or load them if they have been compiled on this machine."""
    native.load(native.PRODUCTS)


def why_not(config: ModelConfig, device: torch.device) -> str | None:
    """Return the reason why this backend cannot run the experts of the model on ``device``, or None if it can."""
    if reason := native.why_not(device):
        return reason
    # Two bf16 values are one operand of the processor's product. The dtype of the model is not known here.
    found = ((name, size) for name, sizes in expert_sizes(config).items() for size in sorted(sizes))
    odd = next((f"{name} ({size}) must be even" for name, size in found if size % 2), None)
    return f"{odd}, because bf16 is multiplied in pairs" if odd else ramps(config)
