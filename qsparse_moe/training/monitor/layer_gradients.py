"""How large the gradient of each layer's matrices is, from the part of it that every rank holds. L layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from qsparse_moe.training.engines.protocol import Engine

_MATRIX = re.compile(
    r"layers\.(\d+)\.(?:attention\.(?:qkv|output)\.weight|(?:moe\.experts|moe\.shared|dense)\.w_(?:gate|up|down))"
)


def layer_matrices(names: Iterable[str]) -> list[list[str]]:
    """Of the parameters ``names``, those behind a sparse site, by layer: of attention and of every feed-forward.

    Norms, routers and the gate of shared experts, which Q-Sparse leaves alone, belong to no list.
    """
    layers: dict[int, list[str]] = {}
    for name in names:
        if match := _MATRIX.fullmatch(name):
            layers.setdefault(int(match[1]), []).append(name)
    return [layers[layer] for layer in range(len(layers))]


def layer_squares(engine: Engine) -> Tensor:
    """``(L,)`` float64: this rank's share of the sum of squares of the gradient of each layer's matrices.

    To be called between the step's last backward and ``update``. Added over the ranks it is the square of the norm
    before clipping; nothing waits for the device.
    """
    squares_L = torch.stack(
        [torch.stack([_square(engine, name) for name in names]).sum() for names in layer_matrices(engine.shapes())]
    )
    return squares_L if engine.loss_scaler is None else squares_L / engine.loss_scaler.factor**2


def _square(engine: Engine, name: str) -> Tensor:
    part = engine.gradient_shard(name)
    return torch.linalg.vector_norm(part, dtype=torch.float64).square().to(engine.distributed.device)
