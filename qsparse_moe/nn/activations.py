"""The activations between the input and output matrices of a feed-forward network. N rows, F hidden features.

Every activation has a reference, which defines it, and an autograd function that saves only its inputs for the
backward. Autograd would save an intermediate tensor of the same size for each step of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.kernels.fused_glu.reference import ACTIVATIONS as FUSED_REFERENCES

Activation = Callable[[Tensor, Tensor], Tensor]
UngatedActivation = Callable[[Tensor], Tensor]


def reglu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``relu(gate) * up`` (arXiv 2002.05202)."""
    return gate_NF.relu() * up_NF


def drelu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """``relu(gate) * relu(up)``, which is zero if either branch is negative (TurboSparse, arXiv 2406.05955)."""
    return gate_NF.relu() * up_NF.relu()


def relu2_reference(up_NF: Tensor) -> Tensor:
    """``relu(up)^2``, without a gate (arXiv 2109.08668)."""
    return up_NF.relu().square()


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` that saves only its two inputs for the backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return F.silu(gate_NF).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        grad_up_NF = F.silu(gate_NF).mul_(grad_NF)
        # PyTorch's own backward of SiLU, which has no public name; written out it would take several passes.
        return torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF), grad_up_NF


class _ReLU2GLU(torch.autograd.Function):
    """``relu(gate)^2 * up`` that saves only its two inputs for the backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        # In place on the new tensor of relu, so that no other of this size is allocated.
        return gate_NF.relu().square_().mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        positive_NF = gate_NF.relu()
        through_NF = grad_NF * positive_NF
        grad_up_NF = through_NF * positive_NF
        return through_NF.mul_(up_NF).mul_(2.0), grad_up_NF


class _ReGLU(torch.autograd.Function):
    """``reglu_reference`` that saves only its two inputs for the backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return gate_NF.relu().mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        return _where_positive(grad_NF * up_NF, gate_NF), gate_NF.relu().mul_(grad_NF)


class _DReLU(torch.autograd.Function):
    """``drelu_reference`` that saves only its two inputs for the backward."""

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return gate_NF.relu().mul_(up_NF.relu())

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        grad_gate_NF = _where_positive(up_NF.relu().mul_(grad_NF), gate_NF)
        return grad_gate_NF, _where_positive(gate_NF.relu().mul_(grad_NF), up_NF)


class _ReLU2(torch.autograd.Function):
    """``relu2_reference`` that saves only its input for the backward."""

    @staticmethod
    def forward(ctx: Any, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(up_NF)
        return up_NF.relu().square_()

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        (up_NF,) = ctx.saved_tensors
        return up_NF.relu().mul_(grad_NF).mul_(2.0)


def _where_positive(grad_NF: Tensor, x_NF: Tensor) -> Tensor:
    """Return the gradient where ``x`` is above 0 or NaN, else 0: the backward of PyTorch's ReLU."""
    # Not a product with (x > 0), which would take one pass more and stop the gradient at a NaN.
    return torch.ops.aten.threshold_backward(grad_NF, x_NF, 0.0)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": _SwiGLU.apply,
    "relu2glu": _ReLU2GLU.apply,
    "reglu": _ReGLU.apply,
    "drelu": _DReLU.apply,
}
"""The activations with two branches, gate and up."""
REFERENCES: dict[str, Activation] = FUSED_REFERENCES | {
    "reglu": reglu_reference,
    "drelu": drelu_reference,
}
UNGATED_ACTIVATIONS: dict[str, UngatedActivation] = {"relu2": _ReLU2.apply}
"""The activations with one branch, up. Feed-forward networks that use them have no ``w_gate``."""
UNGATED_REFERENCES: dict[str, UngatedActivation] = {"relu2": relu2_reference}
