"""Rounding of the rows of a site to its number format, in stock PyTorch or by Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from qsparse_moe.sparsity.quantize import Format, as_format

FormatRows = Callable[[Tensor, "Format | Literal['none']"], Tensor]
"""``as_format``, or a faster implementation of it that returns the same bits."""


def as_format_triton(x: Tensor, number_format: Format | Literal["none"]) -> Tensor:
    """Compute ``as_format``: int8 in one pass over memory by Triton, every other format in stock PyTorch."""
    if number_format != "int8":
        return as_format(x, number_format)
    # Imported here, because Triton is an optional dependency.
    from qsparse_moe.kernels.int8_quantize.triton import fake_quantize_triton

    return fake_quantize_triton(x)
