"""Rounding the rows of a site to its number format, by the implementation that selects in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from qsparse_moe.sparsity.quantize import Format, as_format

FormatRows = Callable[[Tensor, "Format | Literal['none']"], Tensor]
"""``as_format`` or a faster version of it, with the same bits."""


def as_format_triton(x: Tensor, number_format: Format | Literal["none"]) -> Tensor:
    """``as_format``: int8 in one pass over memory by Triton, every other format as it is."""
    if number_format != "int8":
        return as_format(x, number_format)
    from qsparse_moe.kernels.int8_quantize.triton import fake_quantize_triton

    return fake_quantize_triton(x)
