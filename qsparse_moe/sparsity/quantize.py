"""Fake quantisation of activations and weights with straight-through gradients, and packing of ternary weights.

int8 activations and ternary weights are Q-Sparse's (arXiv 2407.10969, section 2.4), int4 activations BitNet a4.8's
(arXiv 2411.04965). D is the last dim of rows; D and F are the last two dims of matrices.

In quantised Q-Sparse the mask M comes from the unquantised magnitudes, the scale comes from the whole row, and the
result ``Y = (Q(X) * M) Q_w(W)^T`` contains both scales. A rescale comes last and uses the norm of ``Q(X) * M``. It is
one more factor per row, which can be merged with the scale of the row and does not change the integers.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Format = Literal["int8", "int4", "ternary"]

EPSILON = 1e-30
"""Added to every divisor, so that a row of zeros stays zero. The papers give no value. BitNet's 1e-5 would erase rows
in front of a down projection, which can be as small as 1e-13 after ReLU^2. 127 divided by this value is finite."""

_SQRT_7 = math.sqrt(7.0)
_CODES_PER_BYTE = 4


class Quantized(NamedTuple):
    """Integer ``codes``, stored in the dtype of ``scale`` (at least fp32), and the ``scale`` that multiplies them."""

    codes: Tensor
    scale: Tensor


def quantize(x: Tensor, number_format: Format) -> Quantized:
    """Round ``x`` to integer codes, halves to the even neighbour, computed in at least fp32.

    * int8: ``RoundClip(127 x / (g + e), -128, 127)`` with ``g = max|x|`` of the row; the scale is ``g / 127``.
    * int4: ``RoundClip(sqrt(7) x / (b + e), -8, 7)`` with ``b = mean|x|`` of the row; the scale is ``b / sqrt(7)``.
    * ternary: ``RoundClip(x / (a + e), -1, 1)`` with ``a = mean|x|`` of the matrix; the scale is ``a``.

    Args:
        x: rows ``(*, D)`` for int8 and int4; matrices ``(*, D, F)`` for ternary, so that each of several stacked
            experts has its own scale.
        number_format: the format.

    Returns:
        Codes in the shape of ``x``; the scale ``(*, 1)``, or ``(*, 1, 1)`` for ternary. A row (matrix) with a NaN or an
        infinite value gets a scale that is not finite, so no value of it is finite after dequantisation.

    Raises:
        ValueError: the format is unknown, or a ternary ``x`` has fewer than two dims.
    """
    # In bf16 the quotient itself would be rounded to 8 bits, before it is rounded to a code.
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if number_format == "int8":
        # Without the factor 127, the quotient would round to -1, 0, and 1 only. The clip is part of the paper's
        # formula; with this factor no finite value reaches beyond it.
        # max|x| without the copy of all rows that abs() writes: half of its time on a CPU. NaN passes through both.
        low, high = wide.aminmax(dim=-1, keepdim=True)
        largest = torch.maximum(low.neg(), high).abs_()
        return Quantized((127.0 / (largest + EPSILON) * wide).round_().clamp_(-128, 127), largest / 127.0)
    if number_format == "int4":
        mean = wide.abs().mean(-1, keepdim=True)
        return Quantized((_SQRT_7 / (mean + EPSILON) * wide).round_().clamp_(-8, 7), mean / _SQRT_7)
    if number_format != "ternary":
        raise ValueError(f"number_format must be int8, int4 or ternary, got {number_format!r}")
    if x.dim() < 2:
        raise ValueError(f"x must have at least two dims for one ternary scale per matrix, got shape {tuple(x.shape)}")
    mean = wide.abs().mean((-2, -1), keepdim=True)
    # Adding zero turns -0.0 into 0.0, so that the codes survive packing into 2 bits unchanged.
    return Quantized((wide / (mean + EPSILON)).round_().clamp_(-1, 1).add_(0.0), mean)


def fake_quantize(x: Tensor, number_format: Format) -> Tensor:
    """Return ``x`` quantised and dequantised, in its shape and dtype; the gradient passes straight through.

    Args:
        x: ``(*, D)``, or ``(*, D, F)`` for ternary. It is not changed.
        number_format: ``int8`` or ``int4`` with one scale per row, or ``ternary`` with one scale per matrix.

    Raises:
        ValueError: as for ``quantize``.
    """
    return _FakeQuantize.apply(x, number_format)


def as_format(x: Tensor, number_format: Format | Literal["none"]) -> Tensor:
    """Return ``x`` itself for the format ``none``, else ``fake_quantize(x, number_format)``."""
    return x if number_format == "none" else fake_quantize(x, number_format)


def pack_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ternary codes of ``weight``, packed into 2 bits each, and their scales.

    Args:
        weight: finite matrices ``(*, D, F)``.

    Returns:
        ``(*, D, ceil(F / 4))`` uint8, the first of four codes in the lowest bits, and the scale ``(*, 1, 1)``.

    Raises:
        ValueError: a value is not finite.
    """
    codes, scale = quantize(weight, "ternary")
    if not scale.isfinite().all():
        raise ValueError("weight must be finite to be packed; use a checkpoint from before it became NaN or infinite")
    padding = -codes.shape[-1] % _CODES_PER_BYTE
    fields = torch.nn.functional.pad((codes + 1).to(torch.uint8), (0, padding)).unflatten(-1, (-1, _CODES_PER_BYTE))
    return (fields << _shifts(weight.device)).sum(-1, dtype=torch.uint8), scale


def unpack_ternary(packed: Tensor, scale: Tensor, num_columns: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrices ``(*, D, F)`` that were packed: bit for bit ``fake_quantize(weight, "ternary")``.

    Args:
        packed: ``(*, D, ceil(F / 4))`` uint8.
        scale: ``(*, 1, 1)``.
        num_columns: F.
        dtype: the dtype of the weight.

    Raises:
        ValueError: ``num_columns`` does not match the width of ``packed``.
    """
    if -(-num_columns // _CODES_PER_BYTE) != packed.shape[-1]:
        raise ValueError(
            f"num_columns ({num_columns}) must need {packed.shape[-1]} bytes per row, at four codes per byte"
        )
    fields = (packed[..., None] >> _shifts(packed.device)) & 3
    codes = fields.flatten(-2)[..., :num_columns].to(scale.dtype) - 1
    # One product in the dtype of the scale, rounded once, as in fake_quantize: the bits must be equal.
    return (codes * scale).to(dtype)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 8, 2, dtype=torch.uint8, device=device)


class _FakeQuantize(torch.autograd.Function):
    """Codes times scale forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number_format: Format) -> Tensor:
        codes, scale = quantize(x, number_format)
        return codes.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
