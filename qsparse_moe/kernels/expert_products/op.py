"""The experts' products by the C++ operators as one autograd operation. N routed tokens, E experts, X, Y widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.kernels import native, onednn


def expert_products(
    rows_NX: Tensor, first_EXY: Tensor, second_EXY: Tensor | None = None, *, counts_E: Tensor
) -> tuple[Tensor, ...]:
    """Compute ``reference.expert_products`` with the C++ operators.

    fp32, and bf16 on processors with instructions for it, are multiplied as they are. Other bf16, and fp16, are
    multiplied in fp32 and rounded once; fp64 is not supported.
    """
    native.load(native.PRODUCTS)
    weights = (first_EXY,) if second_EXY is None else (first_EXY, second_EXY)
    if torch.is_grad_enabled():
        return _ExpertProducts.apply(rows_NX, counts_E, *weights)
    return tuple(_products([rows_NX], [stack], counts_E) for stack in weights)


class _ExpertProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NX: Tensor, counts_E: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows_NX, counts_E, *weights)
        return tuple(_products([rows_NX], [stack], counts_E) for stack in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_NX, counts_E, *weights = ctx.saved_tensors
        # Frozen weights, and the input of the first layer, need no product.
        grad_rows = None
        if ctx.needs_input_grad[0]:
            # One sum over all stacks in fp32: added afterwards, the parts would pass over memory again.
            grad_rows = _products(grads, [stack.mT for stack in weights], counts_E)
        grad_weights = [
            _outer_products(rows_NX, grad_NY, stack, counts_E) if needed else None
            for grad_NY, stack, needed in zip(grads, weights, ctx.needs_input_grad[2:], strict=True)
        ]
        return grad_rows, None, *grad_weights


def _products(rows: Sequence[Tensor], weights: Sequence[Tensor], counts_E: Tensor) -> Tensor:
    """Return the sum over the pairs of rows and stacks of weights, rounded once."""
    dtype = rows[0].dtype
    transposed = not weights[0].is_contiguous()
    stored = [stack.mT if transposed else stack for stack in weights]
    out = torch.ops.qsparse_moe.expert_products(
        [_operand(part) for part in rows], [_operand(stack) for stack in stored], counts_E, transposed
    )
    return out.to(dtype)


def _outer_products(rows_NX: Tensor, grad_NY: Tensor, like_EXY: Tensor, counts_E: Tensor) -> Tensor:
    """Return ``(E, X, Y)``: the transposed rows of each expert times the gradient of its results; zero without rows."""
    outer = torch.ops.qsparse_moe.expert_outer_products
    rows, grad = _operand(rows_NX), _operand(grad_NY)
    # In the layout of the weights, which may be a transposed view: autograd would copy a gradient in another one.
    out = outer(rows, grad, counts_E) if like_EXY.is_contiguous() else outer(grad, rows, counts_E).mT
    return out.to(rows_NX.dtype)


def _operand(x: Tensor) -> Tensor:
    """Return ``x`` in a dtype that the operators multiply, with contiguous features."""
    as_it_is = x.dtype == torch.bfloat16 and onednn.has_bf16_instructions(x.device)
    if x.dtype in (torch.bfloat16, torch.float16) and not as_it_is:
        x = x.float()
    return x if x.stride(-1) == 1 and (x.dim() == 2 or x.is_contiguous()) else x.contiguous()
