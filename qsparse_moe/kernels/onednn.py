"""Matrix products on a CPU by the faster of the libraries in every PyTorch build. M, K, N: the usual GEMM sizes.

PyTorch computes fp32 products with MKL, which has no AVX-512 path for AMD processors: on a Zen 5 it has less than half
the speed of oneDNN (one thread, 128 x 512 x 768: 95 against 206 GFLOP/s). Without AVX-512, MKL is the faster of the two
(Zen 3: 68 against 51 GFLOP/s). PyTorch computes bf16 products with oneDNN, which supports them only with AVX-512.
PyTorch's own bf16 product has a sixtieth of the speed of fp32 (Zen 3: 1.1 GFLOP/s), so without AVX-512 bf16 products
are computed in fp32 and rounded once.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The operator that torch.compile emits for linear layers on a CPU; it has no public name.
_HAS_OPERATOR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"

# Compiled products that oneDNN and PyTorch's layer above it each keep (by default 1024): 0.65 MB apiece, whatever the
# size of the product. 256 hold those of a step, also where the numbers of rows of the experts differ in every step: a
# run of tests/support/layout_cases.py took as long as with 1024, in 370 MB less.
_MAX_COMPILED = 256


def limit_compiled_products() -> None:
    """Limit the memory that oneDNN keeps for products of sizes that it met, which a long run would fill.

    It must be called before the first product of the process. ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` and
    ``LRU_CACHE_CAPACITY`` take precedence if they are set.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_MAX_COMPILED))


def is_faster_in_fp32() -> bool:
    """Return whether ``gemm`` in fp32 is faster than PyTorch's own product on this processor."""
    return _HAS_OPERATOR and _HAS_AVX512


def has_matrix_registers() -> bool:
    """Return whether this processor multiplies bf16 in matrix registers (AMX), which oneDNN uses."""
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def needs_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products in ``dtype`` are computed in fp32 and rounded, because ``device`` has no fast ones."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not _HAS_AVX512


def has_bf16_instructions(device: torch.device) -> bool:
    """Return whether products in bf16 are faster than in fp32 on ``device``; False where it is not known.

    AVX-512 alone is not enough: without instructions for bf16, oneDNN converts every operand.
    """
    if device.type != "cpu" or needs_fp32(torch.bfloat16, device) or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def why_not(device: torch.device) -> str | None:
    """Return the reason why ``gemm`` cannot run on ``device``, or None if it can."""
    if device.type != "cpu":
        return f"oneDNN runs on CPUs, the device is {device.type}"
    if not _HAS_OPERATOR:
        return f"torch {torch.__version__} was built without oneDNN's linear operator"
    return None


def gemm(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """Write ``a @ b`` into ``out``, with any strides: fp32 by oneDNN, other dtypes by ``torch_gemm``."""
    if a_MK.dtype != torch.float32:
        torch_gemm(a_MK, b_KN, out_MN)
    elif out_MN.stride(0) == 1 < out_MN.stride(1):
        # A transposed result is the product of the transposed operands, without a copy across the rows.
        gemm(b_KN.T, a_MK.T, out_MN.T)
    else:
        # The operator allocates its result. The copy costs less than a tenth of what oneDNN gains (lab log of 23
        # November 2026).
        out_MN.copy_(_product(a_MK, b_KN.T))


def torch_gemm(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """Write ``a @ b`` into ``out``, with any strides, by torch.mm: MKL for fp32 and fp64, oneDNN for bf16."""
    if needs_fp32(a_MK.dtype, a_MK.device):
        out_MN.copy_(a_MK.float() @ b_KN.float())
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return ``x @ weight.T`` for ``x`` ``(*, K)``, like ``torch.nn.functional.linear`` but faster on a CPU."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and is_faster_in_fp32():
        # A function of its own, because PyTorch has no derivative of this operator: gradients would be missing.
        return _Linear.apply(x.flatten(0, -2), weight_NK).unflatten(0, x.shape[:-1])
    if needs_fp32(x.dtype, x.device):
        return F.linear(x.float(), weight_NK.float()).to(x.dtype)
    return F.linear(x, weight_NK)


class Linear(torch.nn.Linear):
    """A ``torch.nn.Linear`` without a bias that is computed by ``linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*, in)`` to ``(*, out)``."""
        return linear(x, self.weight)


def _product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """Return ``a @ b.T`` in a new tensor."""
    # No bias, and "none" as the operation that is fused into the product.
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return _product(x_MK, weight_NK)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MK, weight_NK = ctx.saved_tensors
        # The input of the first layers and frozen weights need no gradient, and each is a whole product.
        grad_x = _product(grad_MN, weight_NK.T) if ctx.needs_input_grad[0] else None
        grad_weight = _product(grad_MN.T, x_MK.T) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
