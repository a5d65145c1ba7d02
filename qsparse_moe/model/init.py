"""Values of the parameters of a new model: their sources, and the initial values, in one place."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.model.random_values import fill_normal
from qsparse_moe.moe.expert_group import expert_group


class WeightSource(Protocol):
    """The weights of a model: initial values, or those of a file."""

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Write values ``start`` to ``start + len(out)`` of the flattened global parameter ``name`` into ``out``.

        ``out`` is one-dimensional, of any floating-point dtype and on any device.
        """


class RandomWeights:
    """Initial values, each of which depends on the seed, the name of its parameter, and its index only.

    Norm weights are 1 and biases 0. Matrices are normal with ``init_std``. The two that write into the residual stream
    are scaled by ``1 / sqrt(2 * num_layers)``, so that the variance of the stream does not grow with depth (GPT-2).
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """See ``WeightSource``."""
        if "norm" in name:
            out.fill_(1.0)
            return
        if name.endswith(".bias"):
            out.zero_()
            return
        std = self._config.init_std
        if name.endswith(("w_down", "attention.output.weight")):
            std /= math.sqrt(2 * self._config.num_layers)
        fill_normal(self._seed, name, start, out, std=std)


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter with its values of ``RandomWeights``."""
    for name, parameter in model.named_parameters():
        initialize_parameter(name, parameter, config, seed)


def initialize_parameter(name: str, parameter: nn.Parameter, config: ModelConfig, seed: int) -> None:
    """Fill one parameter, of which this rank may hold a shard, with its values of ``RandomWeights``."""
    fill_range(RandomWeights(config, seed), name, parameter, parameter.detach().view(-1), 0)


def materialize(model: nn.Module, source: WeightSource, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Fill this rank's shard of every parameter from ``source``.

    Parameters on the meta device receive memory on ``device`` in ``dtype`` first; others keep theirs.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            use_memory(parameter, torch.empty(parameter.shape, device=device, dtype=dtype))
        fill_range(source, name, parameter, parameter.detach().view(-1), 0)


def use_memory(parameter: nn.Parameter, memory: Tensor) -> None:
    """Let a parameter on the meta device have ``memory``, in place: tied parameters, tags, and optimizers keep it."""
    holder = nn.Parameter(memory, requires_grad=parameter.requires_grad)
    # The attributes are swapped with the memory.
    holder.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, holder)


def fill_range(source: WeightSource, name: str, parameter: nn.Parameter, out: Tensor, start: int) -> None:
    """Fill ``out`` with values ``start`` to ``start + len(out)`` of this rank's flattened shard of ``parameter``."""
    # The experts are the first dim, so that a shard is a range of the flattened global tensor.
    source.fill(name, expert_group(parameter).rank * parameter.numel() + start, out)
