"""What tests and benchmarks know of an operation: its definition, its fast versions, inputs to try them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Operation = Callable[..., Any]
WhyNot = Callable[[torch.device], "str | None"]


@dataclass(frozen=True)
class Example:
    """Arguments of one call: ``operation(**tensors, **settings)``. Gradients are taken by all of ``tensors``."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """A fast version of an operation, imported on first use.

    ``target`` is ``module:function``; ``why_not(device)`` is the reason why it cannot run there, or None.
    """

    target: str
    why_not: WhyNot

    def load(self) -> Operation:
        """The function itself; its module is imported now."""
        module, _, function = self.target.partition(":")
        return getattr(import_module(module), function)


@dataclass(frozen=True)
class OpSpec:
    """An operation with the function that defines it and its fast versions by name.

    ``reference`` runs in any floating-point dtype on any device. ``example_inputs(case, dtype, device)`` makes the
    arguments of a named case; beside ``cases`` every operation knows the case ``large``, for benchmarks. ``budget`` is
    how many times the reference's own rounding error a fast version may be off, 0 being not at all. ``dtypes`` are
    those it is made for.
    """

    name: str
    reference: Operation
    fast: Mapping[str, Implementation]
    example_inputs: Callable[[str, torch.dtype, str], Example]
    cases: tuple[str, ...]
    budget: float
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def load(self, name: str) -> Operation:
        """The fast version ``name``."""
        return self.fast[name].load()
