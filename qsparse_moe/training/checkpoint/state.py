"""Weights and optimizer state as global fp32 tensors by name, which do not depend on the engine or the layout."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qsparse_moe.errors import CheckpointError
from qsparse_moe.moe.expert_group import global_shape, local_shard
from qsparse_moe.training.engines.protocol import STATE_KINDS, Engine, StateKind

Tensors = dict[str, dict[str, Tensor]]
"""Tensors by kind (``STATE_KINDS``), then by parameter name."""


def owners(shapes: Mapping[str, torch.Size], world_size: int) -> dict[str, int]:
    """Return the rank that writes each parameter. The largest come first, each to the rank with the fewest elements."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    load = [0] * world_size
    owner = {}
    # The name breaks ties, so that all ranks compute the same owners.
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def collect(engine: Engine) -> Tensors:
    """Return the global tensors that this rank owns, on the CPU. All ranks must call it together."""
    owner = owners(engine.shapes(), engine.distributed.world_size)
    owned: Tensors = {kind: {} for kind in STATE_KINDS}
    for name in owner:
        for kind in STATE_KINDS:
            # One tensor at a time, so that a rank never holds more than one global tensor that it does not own.
            tensor = engine.get_full(name, kind)
            if owner[name] == engine.distributed.rank:
                # A copy, because the engine may return a view of its own state.
                owned[kind][name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return owned


def collect_buffers(engine: Engine) -> dict[str, Tensor]:
    """Return copies of the buffers that belong to the model's state, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state_buffers(engine.model).items()}


def restore(engine: Engine, read: Callable[[StateKind, str], Tensor], adam_step: int) -> None:
    """Set the global tensors and Adam's step counter of an engine that was built with the same weights."""
    for name in engine.shapes():
        for kind in STATE_KINDS:
            engine.set_full(name, kind, read(kind, name))
    engine.adam_step = adam_step


def restore_weights(engine: Engine, read: Callable[[str], Tensor]) -> None:
    """Set the global fp32 weights of an engine that was built with the same weights, perhaps rounded."""
    for name in engine.shapes():
        engine.set_full(name, "weight", read(name))


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers by name in the state dict, such as the routers' biases that balance experts.

    They are the same on every rank with every engine.
    """
    # keep_vars leaves parameters as nn.Parameter, which distinguishes them from buffers.
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if not isinstance(value, nn.Parameter)}


def stored_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the global shape of every parameter, a tied one once, and of every buffer of ``state_buffers``."""
    return global_shapes(model) | {name: value.shape for name, value in state_buffers(model).items()}


@torch.no_grad()
def load_model(model: nn.Module, read: Callable[[StateKind, str], Tensor], buffer: Callable[[str], Tensor]) -> None:
    """Copy global tensors into the model's parameters and buffers, rounding to their dtype.

    A sharded parameter receives this rank's shard.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(local_shard(parameter, read("weight", name)))
    for name, value in state_buffers(model).items():
        value.copy_(buffer(name))


def global_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the global shape of every parameter by its name in the state dict; a tied one occurs once."""
    return {name: global_shape(parameter) for name, parameter in model.named_parameters()}


def check_shapes(want: Mapping[str, torch.Size], have: Mapping[str, list[int]], file: str) -> None:
    """Raise CheckpointError unless the tensors that ``file`` describes have the names and shapes of the model's."""
    for name, ours, theirs in differing_shapes(want, have):
        raise CheckpointError(
            f"{file}: {name} has the shape {theirs} in the checkpoint and {ours} in the model; they must be equal. Use "
            "the config.yaml of the run that wrote it, or start a new run"
        )


def differing_shapes(
    want: Mapping[str, Sequence[int]], have: Mapping[str, Sequence[int]]
) -> list[tuple[str, str, str]]:
    """Return the name and both shapes, as text, of every tensor whose shapes differ or that only one side has."""
    pairs = [(name, want.get(name), have.get(name)) for name in sorted(want.keys() | have.keys())]
    return [
        (name, _format_shape(ours), _format_shape(theirs))
        for name, ours, theirs in pairs
        if ours is None or theirs is None or list(ours) != list(theirs)
    ]


def _format_shape(shape: Sequence[int] | None) -> str:
    return "none (no such tensor)" if shape is None else str(tuple(shape))


def random_states() -> dict[str, Any]:
    """Return the states of this process's generators in a form that ``torch.load(weights_only=True)`` reads."""
    _, keys, position, has_gauss, gauss = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    version, internal, next_gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        # weights_only admits no numpy arrays, hence tensors and plain numbers.
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), next_gauss],
    }
    # Only if this run uses CUDA: reading the state would otherwise initialize it.
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states of this process's generators from ``random_states``."""
    torch.set_rng_state(states["torch"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal), next_gauss))
    # A run may resume on a machine with another kind of device.
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_random_states(seed: int, step: int, rank: int) -> None:
    """Seed this process's generators for a part of a run that begins at ``step``."""
    # Mixed by a hash: sums of seed, step, and rank would repeat among neighbouring runs and ranks.
    mixed = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)
