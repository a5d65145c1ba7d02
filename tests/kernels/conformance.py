"""Outputs and gradients of an operation as named parts, for comparing one implementation with another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.kernels.spec import Example


def outputs_and_grads(operation: Callable[..., Any], example: Example, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output, and the gradient of every tensor under random upstream gradients, on the CPU in fp64.

    The same upstream values are used in every dtype: those that the example's own dtype holds exactly.
    """
    own = next(iter(example.tensors.values())).dtype
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in example.tensors.items()}
    outputs = dict(_flatten("output", operation(**leaves, **example.settings)))
    differentiable = {name: out for name, out in outputs.items() if out.requires_grad}
    if not differentiable:
        return {name: out.cpu().double() for name, out in outputs.items()}
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(out.shape, generator=generator).to(own).to(out) for out in differentiable.values()]
    grads = torch.autograd.grad(list(differentiable.values()), list(leaves.values()), upstream)
    parts = outputs | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: part.detach().cpu().double() for name, part in parts.items()}


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif value is not None:
        for key, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _flatten(f"{name} {key}", part)


@contextmanager
def new_memory_holds_nan() -> Iterator[None]:
    """Inside, ``torch.empty`` is filled with NaN (integers: their maximum), in Python and in C++."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def too_far_off(fast: Tensor, plain: Tensor, exact: Tensor, *, budget: float, eps: float) -> str | None:
    """Return the fault of ``fast``, or None; ``plain`` is the reference in the dtype of ``fast``, ``exact`` in fp64."""
    if fast.shape != exact.shape:
        return f"shape {tuple(fast.shape)} is not {tuple(exact.shape)}"
    if not exact.numel():
        return None
    rounding = (plain - exact).abs().max().item()
    error = (fast - exact).abs().max().item()
    allowed = budget * rounding + eps * exact.abs().max().item()
    # A NaN compares as not within what is allowed.
    return None if error <= allowed else f"error {error:.3e}, allowed {allowed:.3e}"
