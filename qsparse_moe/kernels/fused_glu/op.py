"""Gated activation, selection, and row sums as one autograd operation. N rows, F hidden features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.kernels import native, tiles
from qsparse_moe.kernels.fused_glu.native import backward_native, forward_native
from qsparse_moe.kernels.fused_glu.reference import SelectionSums
from qsparse_moe.kernels.spec import WhyNot


@dataclass(frozen=True)
class FusedGLU:
    """A named implementation.

    ``forward(gate_NF, up_NF, num_selected, activation, *, with_mask, with_sums)`` returns the selected rows ``(N, F)``,
    the bool mask ``(N, F)``, and the sums ``(4, N)`` in fp32, in the order of ``SelectionSums``. The mask and the sums
    are empty tensors if they were not requested.
    ``backward(gate_NF, up_NF, grad_NF, mask_NF or None, activation)`` returns the gradients of gate and up.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]
    why_not: WhyNot


def fused_glu(
    gate_NF: Tensor,
    up_NF: Tensor,
    num_selected: int | Tensor,
    *,
    by: FusedGLU,
    activation: str = "relu2glu",
    gradient: str = "ste",
    with_sums: bool = True,
) -> tuple[Tensor, SelectionSums | None]:
    """Compute ``reference.fused_glu`` with ``by``; without ``with_sums`` the second result is None."""
    if torch.is_grad_enabled():
        selected_NF, sums_4N = _FusedGLU.apply(
            gate_NF, up_NF, num_selected, by, activation, gradient == "masked", with_sums
        )
    else:
        # Without the cost of an autograd function, which counts in a step of generation.
        selected_NF, _, sums_4N = by.forward(
            gate_NF, up_NF, num_selected, activation, with_mask=False, with_sums=with_sums
        )
    return selected_NF, SelectionSums(*sums_4N) if with_sums else None


def fused_glu_native(gate_NF: Tensor, up_NF: Tensor, num_selected: int | Tensor, **settings: Any) -> Any:
    """Compute ``fused_glu`` with the C++ operators."""
    return fused_glu(gate_NF, up_NF, num_selected, by=NATIVE, **settings)


def fused_glu_triton(gate_NF: Tensor, up_NF: Tensor, num_selected: int | Tensor, **settings: Any) -> Any:
    """Compute ``fused_glu`` with the Triton kernels."""
    return fused_glu(gate_NF, up_NF, num_selected, by=TRITON, **settings)


def _triton_forward(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here, because Triton is an optional dependency.
    from qsparse_moe.kernels.fused_glu import triton

    return triton.forward_triton(*arguments, **settings)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from qsparse_moe.kernels.fused_glu import triton

    return triton.backward_triton(*arguments)


# 2048 rows of 768 in bf16 with SwiGLU take 1.58 ms in one pass and 1.87 in two, with sums 1.79 and 12.1 (one thread of
# a Zen 5, lab log of 23 November 2026).
NATIVE = FusedGLU("native", forward_native, backward_native, native.why_not)
TRITON = FusedGLU("triton", _triton_forward, _triton_backward, tiles.why_not)
# No implementation in stock PyTorch: without one of these, the activation and the site run one after the other.
FUSED_GLUS: tuple[FusedGLU, ...] = (NATIVE, TRITON)
"""All implementations, fastest first."""


class _FusedGLU(torch.autograd.Function):
    """Saves gate and up for the backward, which recomputes the activation, and the mask for a masked gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_NF: Tensor,
        up_NF: Tensor,
        num_selected: int | Tensor,
        by: FusedGLU,
        activation: str,
        masked: bool,
        with_sums: bool,
    ) -> tuple[Tensor, Tensor]:
        selected_NF, mask_NF, sums_4N = by.forward(
            gate_NF, up_NF, num_selected, activation, with_mask=masked, with_sums=with_sums
        )
        ctx.save_for_backward(gate_NF, up_NF, mask_NF if masked else None)
        ctx.by, ctx.activation = by, activation
        # Otherwise autograd would allocate a gradient of zeros for the sums.
        ctx.mark_non_differentiable(sums_4N)
        return selected_NF, sums_4N

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gate_NF, up_NF, mask_NF = ctx.saved_tensors
        grad_gate_NF, grad_up_NF = ctx.by.backward(gate_NF, up_NF, grad_NF, mask_NF, ctx.activation)
        return grad_gate_NF, grad_up_NF, None, None, None, None, None
