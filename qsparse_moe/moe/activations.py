"""The gated activations between an expert's two matrices. N rows, F hidden features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor, Tensor], Tensor]


def swiglu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202)."""
    return F.silu(gate_NF) * up_NF


def relu2glu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``relu(gate)^2 * up`` (arXiv 2407.10969, section 2.3)."""
    return gate_NF.relu().square() * up_NF


class _SwiGLU(torch.autograd.Function):
    """``swiglu_reference`` that keeps only its two inputs for the backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return F.silu(gate_NF).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        grad_up_NF = F.silu(gate_NF).mul_(grad_NF)
        return torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_up_NF


class _ReLU2GLU(torch.autograd.Function):
    """``relu2glu_reference`` that keeps only its two inputs for the backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return gate_NF.relu().square_().mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        positive_NF = gate_NF.relu()
        through_NF = grad_NF * positive_NF
        grad_up_NF = through_NF * positive_NF
        return through_NF.mul_(up_NF).mul_(2.0), grad_up_NF


ACTIVATIONS: dict[str, Activation] = {"swiglu": _SwiGLU.apply, "relu2glu": _ReLU2GLU.apply}
REFERENCES: dict[str, Activation] = {"swiglu": swiglu_reference, "relu2glu": relu2glu_reference}
