"""Shared features taken out of rows and of stacked weights, with gradients of the full shape that are zero elsewhere.

N rows sorted by expert, L stacked matrices (one per expert of this rank), X inputs, Y outputs, K selected features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_features(x_NX: Tensor, index_LK: Tensor, counts: list[int]) -> Tensor:
    """Return ``(N, K)``: of every row, the features of its expert.

    Args:
        x_NX: the rows.
        index_LK: the features of each expert, each at most once.
        counts: number of rows of each expert.
    """
    return _TakeFeatures.apply(x_NX, index_LK, counts)


def take_weights(weights_LXY: Tensor, inputs_LK: Tensor | None, outputs_LK: Tensor | None) -> Tensor:
    """Return the stacked matrices with the listed rows (inputs) and columns (outputs) only; None takes all."""
    if inputs_LK is None and outputs_LK is None:
        return weights_LXY
    return _TakeWeights.apply(weights_LXY, inputs_LK, outputs_LK)


class _TakeFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NX: Tensor, index_LK: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(index_LK)
        ctx.counts, ctx.shape = counts, x_NX.shape
        # Per expert: one gather of all rows would read an index of eight bytes for every value.
        parts = [rows.index_select(1, index) for rows, index in zip(x_NX.split(counts), index_LK, strict=True)]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor, None, None]:
        (index_LK,) = ctx.saved_tensors
        grad_NX = grad_NK.new_zeros(ctx.shape)
        parts = zip(grad_NX.split(ctx.counts), grad_NK.split(ctx.counts), index_LK, strict=True)
        for out, grad, index in parts:
            out.index_copy_(1, index, grad)
        return grad_NX, None, None


class _TakeWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_LXY: Tensor, inputs_LK: Tensor | None, outputs_LK: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs_LK, outputs_LK)
        ctx.shape = weights_LXY.shape
        taken = weights_LXY
        if inputs_LK is not None:
            flat = taken.reshape(-1, taken.shape[2]).index_select(0, _flat(inputs_LK, taken.shape[1]))
            taken = flat.view(*inputs_LK.shape, -1)
        # Columns by gather: 2.1 ms for 16 matrices of 512 x 768 and K 192, against 5.2 by index_select per matrix.
        return taken if outputs_LK is None else taken.gather(2, _columns(outputs_LK, taken.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad_LKK: Tensor) -> tuple[Tensor, None, None]:
        inputs_LK, outputs_LK = ctx.saved_tensors
        num_matrices, num_inputs, num_outputs = ctx.shape
        if outputs_LK is None:
            flat = grad_LKK.new_zeros(num_matrices * num_inputs, num_outputs)
            flat.index_copy_(0, _flat(inputs_LK, num_inputs), grad_LKK.reshape(-1, num_outputs))
            return flat.view(ctx.shape), None, None
        grad_LXY = grad_LKK.new_zeros(ctx.shape)
        if inputs_LK is None:
            return grad_LXY.scatter_(2, _columns(outputs_LK, num_inputs), grad_LKK), None, None
        # In one step: zeros of the full size take longer than anything else here, and are needed once in this way.
        places_LN = (inputs_LK[:, :, None] * num_outputs + outputs_LK[:, None]).flatten(1)
        grad_LXY.view(num_matrices, -1).scatter_(1, places_LN, grad_LKK.reshape(num_matrices, -1))
        return grad_LXY, None, None


def _flat(inputs_LK: Tensor, num_inputs: int) -> Tensor:
    """Return the indices of the rows of all matrices, as rows of one tall matrix."""
    first_L1 = torch.arange(len(inputs_LK), device=inputs_LK.device)[:, None] * num_inputs
    return (inputs_LK + first_L1).flatten()


def _columns(outputs_LK: Tensor, num_rows: int) -> Tensor:
    return outputs_LK[:, None].expand(-1, num_rows, -1)
