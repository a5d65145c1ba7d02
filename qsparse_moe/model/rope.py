"""Rotary position embedding (arXiv 2104.09864), in the half-split form of most published checkpoints.

B batch, H heads, S sequence, C channels per head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.config.rotary_schema import RopeScalingConfig
from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.config.shapes import rotary_size


class Rotation(NamedTuple):
    """Cosines and sines ``(B or 1, 1, S, C / 2)``, which broadcast over the heads of ``(B, H, S, C)``."""

    cos: Tensor
    sin: Tensor


def rotary_frequencies(config: ModelConfig, *, device: torch.device | None = None) -> Tensor:
    """Return ``(C / 2,)`` fp32: the angle between two positions, ``theta^(-2i / C)``, scaled by ``rope_scaling``."""
    size = rotary_size(config)
    exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    frequencies: Tensor = config.rope_theta**-exponents
    scaling = config.rope_scaling
    match scaling.type:
        case "none":
            return frequencies
        case "linear":
            return frequencies / scaling.factor
        case "llama3":
            return _llama3(frequencies, scaling)
        case "yarn":
            return _yarn(frequencies, scaling, theta=config.rope_theta)


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Divide the frequencies with few turns within the original length by the factor, and keep those with many."""
    assert scaling.original_length is not None, "checked by the rules of the configuration"
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScalingConfig, *, theta: float) -> Tensor:
    """Blend divided and unchanged frequencies linearly between two channels (arXiv 2309.00071, section 3.2)."""
    assert scaling.original_length is not None, "checked by the rules of the configuration"
    size = 2 * len(frequencies)

    def channel(turns: float) -> float:
        """Return the index i at which ``theta^(-2i / C)`` makes ``turns`` turns within the original length."""
        assert scaling.original_length is not None
        return size * math.log(scaling.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    # Whole channels, and these limits, as in the authors' code and in transformers.
    first = max(0, math.floor(channel(scaling.beta_fast)))
    last = min(size - 1, math.ceil(channel(scaling.beta_slow)))
    channels = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    divided = ((channels - first) / (last - first or 0.001)).clamp(0, 1)
    return divided * frequencies / scaling.factor + (1 - divided) * frequencies


def rotation_factor(config: ModelConfig) -> float:
    """Return the factor by which a rotation multiplies queries and keys in addition; 1 except for yarn."""
    scaling = config.rope_scaling
    if scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    # Equation 22 of the paper: the scores of longer sequences are made larger.
    return max(1.0, 0.1 * math.log(scaling.factor) + 1)


def rotation_at(positions_BS: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotation:
    """Return the rotation by the angles ``position * frequency``, computed in fp32 and then rounded.

    Cosines and sines contain the ``rotation_factor``.
    """
    # In bf16 positions above 256 would not be exact, and neither would their angles.
    angles_BSC = positions_BS[..., None].float() * rotary_frequencies(config, device=positions_BS.device)
    factor = rotation_factor(config)
    return Rotation(*((part * factor).to(dtype)[:, None] for part in (angles_BSC.cos(), angles_BSC.sin())))


def rotate(x_BHSC: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pair (channel i, channel i + C/2) of every head by the angle of its position."""
    # Halves and not neighbouring pairs: with the other order, the weights of published checkpoints would need a
    # permutation.
    first, second = x_BHSC.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
