"""Parameters that ranks divide among them, and that a module has as a whole only while it runs.

A forward pass then needs this rank's shards and the weights of one module. No rank may run a module alone: the weights
are gathered from all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.transformer import Transformer, build_empty

_ATTRIBUTE = "sharded_parameters"


class Gather(Protocol):
    """Gathers tensors from the ranks, which call it together."""

    def __call__(self, shard: Tensor) -> Tensor:
        """Return the shards of all ranks, one after the other, from this rank's shard; all have the same size."""

    def free(self, whole: Tensor) -> None:
        """Use the memory of a gathered tensor again, which nothing refers to any more."""


@dataclass(frozen=True)
class ShardedParameter:
    """This rank's shard of a parameter: a range of the flattened tensor, padded at its end to one size on all ranks."""

    shard: Tensor
    shape: torch.Size
    gather: Gather

    def whole(self, flat: Tensor) -> nn.Parameter:
        """Return the parameter from what was gathered."""
        return nn.Parameter(flat[: self.shape.numel()].view(self.shape), requires_grad=False)

    def placeholder(self) -> nn.Parameter:
        """Return what stands in its place meanwhile: its shape, dtype, and device, without memory."""
        # NaN, so that whatever reads a weight that is not gathered is noticed.
        nothing = torch.full((), torch.nan, dtype=self.shard.dtype, device=self.shard.device)
        return nn.Parameter(nothing.expand(self.shape), requires_grad=False)


class _WhileRunning:
    """Gathers the parameters of one module before it runs, and releases them afterwards.

    The gathered parameters are new objects, which the graph of a backward pass keeps for as long as it needs them.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, ShardedParameter]) -> None:
        self.parameters = parameters
        self._module, self._num_users = module, 0
        self._gathered: dict[str, Tensor] = {}
        self._release()
        module.register_forward_pre_hook(self._before, prepend=True)
        # Also after an exception, by which a recomputation ends as soon as it has what the backward pass needs.
        module.register_forward_hook(self._after, always_call=True)
        setattr(module, _ATTRIBUTE, self)

    def gather(self) -> None:
        """Give the module its parameters, unless another user has done so."""
        if not self._num_users:
            for name, parameter in self.parameters.items():
                flat = parameter.gather(parameter.shard)
                setattr(self._module, name, parameter.whole(flat))
                # A graph may keep the weights.
                if not torch.is_grad_enabled():
                    self._gathered[name] = flat
        self._num_users += 1

    def release(self) -> None:
        """Take them away again after the last user."""
        self._num_users -= 1
        if not self._num_users:
            self._release()

    def _release(self) -> None:
        for name, parameter in self.parameters.items():
            setattr(self._module, name, parameter.placeholder())
        for name, flat in self._gathered.items():
            self.parameters[name].gather.free(flat)
        self._gathered.clear()

    def _before(self, *_: Any) -> None:
        self.gather()

    def _after(self, *_: Any) -> None:
        self.release()


def shard_module(module: nn.Module, parameters: Mapping[str, ShardedParameter]) -> None:
    """Let ``module`` have these parameters of its own, by name, only while it runs."""
    if parameters:
        _WhileRunning(module, parameters)


def is_sharded(model: nn.Module) -> bool:
    """Return whether ranks divide parameters of ``model`` among them."""
    return any(hasattr(module, _ATTRIBUTE) for module in model.modules())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Keep the parameters of ``module`` and everything in it gathered inside the context. All ranks must enter it."""
    found = [getattr(part, _ATTRIBUTE) for part in module.modules() if hasattr(part, _ATTRIBUTE)]
    for one in found:
        one.gather()
    try:
        yield
    finally:
        for one in found:
            one.release()


def sharing_weights(model: Transformer, config: ModelConfig) -> Transformer:
    """Return a model for evaluation that shares the weights of ``model``, with another config of the same tensors.

    Nothing is copied, and what ranks divide among them stays so. The sparsity is that of ``config``.
    """
    other = build_empty(config, device=model.embedding.weight.device, checks_rules=False)
    # Assigned and not copied: both models have the same weights in memory.
    other.load_state_dict(model.state_dict(), assign=True)
    for name, module in model.named_modules():
        if hasattr(module, _ATTRIBUTE):
            shard_module(other.get_submodule(name), getattr(module, _ATTRIBUTE).parameters)
    return other.eval()
