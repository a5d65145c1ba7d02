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


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Divide the frequencies with few turns within the original length by the factor, and keep those with many."""
    assert scaling.original_length is not None, "checked by the rules of the configuration"
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotation_at(positions_BS: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotation:
    """Return the rotation by the angles ``position * frequency``, computed in fp32 and then rounded."""
    # In bf16 positions above 256 would not be exact, and neither would their angles.
    angles_BSC = positions_BS[..., None].float() * rotary_frequencies(config, device=positions_BS.device)
    return Rotation(angles_BSC.cos().to(dtype)[:, None], angles_BSC.sin().to(dtype)[:, None])


def rotate(x_BHSC: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pair (channel i, channel i + C/2) of every head by the angle of its position."""
    # Halves and not neighbouring pairs: with the other order, the weights of published checkpoints would need a
    # permutation.
    first, second = x_BHSC.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
