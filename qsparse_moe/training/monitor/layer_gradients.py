"""The gradient norm of each layer's matrices, computed from the ranks' gradient shards. L layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from qsparse_moe.training.engines.protocol import Engine

# By the names in the state dict, which are public and do not change.
_MATRIX = re.compile(
    r"layers\.(\d+)\.(?:attention\.(?:qkv|down|query_up|latent_up|output)\.weight|"
    r"(?:moe\.experts|moe\.shared|dense)\.w_(?:gate|up|down))"
)


def layer_matrices(names: Iterable[str]) -> list[list[str]]:
    """Return the names of the matrices of attention and feed-forwards, as one list per layer.

    All are behind a sparse site, except the inner ones of latent attention. Norms, biases, routers, and the gate of
    shared experts are in no list.
    """
    layers: dict[int, list[str]] = {}
    for name in names:
        if match := _MATRIX.fullmatch(name):
            layers.setdefault(int(match[1]), []).append(name)
    return [layers[layer] for layer in range(len(layers))]


def layer_squares(engine: Engine) -> Tensor:
    """Return this rank's part, ``(L,)`` in float64, of the sum of squares of the gradient of each layer's matrices.

    Call it between the last backward of a step and ``update``. The sum over all ranks is the square of the norm before
    clipping. It does not synchronize with the device.
    """
    squares_L = torch.stack(
        [torch.stack([_square(engine, name) for name in names]).sum() for names in layer_matrices(engine.shapes())]
    )
    # In fp16 the gradients still carry the loss scale here; squares carry its square.
    return squares_L if engine.loss_scaler is None else squares_L / engine.loss_scaler.factor**2


def gradient_norm(engine: Engine) -> float:
    """Return the L2 norm of the whole gradient before clipping, without the loss scale.

    All ranks must call it together, between the last backward of a step and ``update``. It is not finite if any element
    of the gradient is not.
    """
    square = torch.stack([_square(engine, name) for name in engine.shapes()]).sum()
    factor = 1.0 if engine.loss_scaler is None else engine.loss_scaler.factor
    return float(engine.distributed.all_reduce(square).sqrt()) / factor


def _square(engine: Engine, name: str) -> Tensor:
    shard = engine.gradient_shard(name)
    # In float64: squares of fp16's scaled gradients overflow fp32, and the ranks' parts add up without rounding noise.
    return torch.linalg.vector_norm(shard, dtype=torch.float64).square().to(engine.distributed.device)
