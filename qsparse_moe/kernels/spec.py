"""Description of an operation for tests and benchmarks: its reference, fast implementations, and example inputs."""

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
    """Arguments of a call ``operation(**tensors, **settings)``. Tests compare the gradients of all ``tensors``."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """A fast implementation of an operation, imported on first use.

    ``target`` is ``module:function``. ``why_not(device)`` returns the reason why it cannot run there, or None.
    """

    target: str
    why_not: WhyNot

    def load(self) -> Operation:
        """Import the module and return the function."""
        # By name, so that listing the operations imports neither Triton nor a compiler.
        module, _, function = self.target.partition(":")
        return getattr(import_module(module), function)


@dataclass(frozen=True)
class OpSpec:
    """An operation: the function that defines it, and its fast implementations by name.

    ``reference`` runs in any floating-point dtype on any device. ``example_inputs(case, dtype, device)`` returns the
    arguments of a named case. Besides ``cases``, every operation has the case ``large`` for benchmarks. ``budget`` is
    the allowed error of a fast implementation as a multiple of the rounding error of the reference; 0 means equal bits.
    ``dtypes`` are the supported dtypes.
    """

    name: str
    reference: Operation
    fast: Mapping[str, Implementation]
    example_inputs: Callable[[str, torch.dtype, str], Example]
    cases: tuple[str, ...]
    budget: float
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def load(self, name: str) -> Operation:
        """Return the fast implementation ``name``."""
        return self.fast[name].load()
