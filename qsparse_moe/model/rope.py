"""Rotary position embedding (arXiv 2104.09864), in the half-split form of most published checkpoints.

B batch, H heads, S sequence, C channels per head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines ``(B or 1, 1, S, C / 2)``, which broadcast over the heads of ``(B, H, S, C)``."""

    cos: Tensor
    sin: Tensor


def rotation_at(positions_BS: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Return the rotation by the angles ``position / theta^(2i / C)``, computed in fp32 and then rounded."""
    # In bf16 positions above 256 would not be exact, and neither would their angles.
    exponents = torch.arange(0, head_size, 2, device=positions_BS.device, dtype=torch.float32) / head_size
    angles_BSC = positions_BS[..., None].float() * theta**-exponents
    return Rotation(angles_BSC.cos().to(dtype)[:, None], angles_BSC.sin().to(dtype)[:, None])


def rotate(x_BHSC: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pair (channel i, channel i + C/2) of every head by the angle of its position."""
    # Halves and not neighbouring pairs: with the other order, the weights of published checkpoints would need a
    # permutation.
    first, second = x_BHSC.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
