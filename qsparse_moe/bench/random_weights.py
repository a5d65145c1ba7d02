"""Random weights in seconds: speed does not depend on the values, and drawing billions of them takes minutes."""

from __future__ import annotations

import torch
from torch import nn

_TILE = 1 << 22


@torch.no_grad()
def fill_random(model: nn.Module, std: float) -> None:
    """Fill the matrices of ``model`` with one tile of normal values again and again, its vectors (norms) with ones.

    The tile has no power of two times the width of a matrix, so the rows of a matrix differ.
    """
    # Drawing a billion values takes half a minute on one thread.
    tile = std * torch.randn(_TILE - 3, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        flat = parameter.view(-1)
        if parameter.dim() < 2:
            flat.fill_(1.0)
            continue
        own = tile.to(parameter.dtype)
        for begin in range(0, len(flat), len(own)):
            part = flat[begin : begin + len(own)]
            part.copy_(own[: len(part)])
