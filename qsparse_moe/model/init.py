"""Initialisation of every parameter of the model, in one function."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.moe.expert_group import global_shape, local_shard

# Normal values are truncated at three standard deviations (OLMoE, arXiv 2409.02060, appendix).
_CUTOFF = 3.0


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter from ``seed`` and its own name, so that a value depends on nothing else in the model."""
    for name, parameter in model.named_parameters():
        initialize_parameter(name, parameter, config, seed)


@torch.no_grad()
def initialize_parameter(name: str, parameter: nn.Parameter, config: ModelConfig, seed: int) -> None:
    """Fill one parameter of the model from ``seed`` and its name.

    Norm weights are 1 and biases 0. Matrices are normal with ``init_std``. The two that write into the residual stream
    are scaled by ``1 / sqrt(2 * num_layers)``, so that the variance of the stream does not grow with depth (GPT-2).
    """
    if "norm" in name:
        parameter.fill_(1.0)
        return
    if name.endswith(".bias"):
        parameter.zero_()
        return
    std = config.init_std
    if name.endswith(("w_down", "attention.output.weight")):
        std /= math.sqrt(2 * config.num_layers)
    # The CPU generator uses only 32 bits of its seed, so seed and name are hashed to 32 bits.
    generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    # The global tensor is drawn on every rank, so that an expert's values do not depend on which rank holds it.
    whole = torch.empty(global_shape(parameter), dtype=parameter.dtype, device=parameter.device)
    # The limits of trunc_normal_ are absolute values, not multiples of std.
    nn.init.trunc_normal_(whole, std=std, a=-_CUTOFF * std, b=_CUTOFF * std, generator=generator)
    parameter.copy_(local_shard(parameter, whole))
