"""Weights and optimizer state as ranges of global fp32 tensors, which do not depend on the engine or the layout."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qsparse_moe.errors import CheckpointError
from qsparse_moe.moe.expert_group import global_shape
from qsparse_moe.nn.shared_selector import AVERAGES
from qsparse_moe.training.checkpoint.tensor_file import TensorSource
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import STATE_KINDS, Engine, StateKind
from qsparse_moe.training.flat_range import FlatRange
from qsparse_moe.training.shard_weights import fill_model

ReadRange = Callable[[StateKind, str, int, int], Tensor]
"""Return the elements from ``start`` to ``stop`` of a flattened global fp32 tensor: kind, name, start, stop."""


def owned_ranges(engine: Engine) -> dict[str, FlatRange]:
    """Return the range of every parameter that this rank saves; parameters of which it saves nothing are left out."""
    ranges = {name: engine.owned_range(name) for name in engine.shapes()}
    return {name: part for name, part in ranges.items() if len(part)}


def owned_tensors(engine: Engine, ranges: Mapping[str, FlatRange]) -> dict[str, TensorSource]:
    """Return the sources of the ranges of weights and moments, by their names in the file; nothing is read yet."""

    def read(kind: StateKind, name: str) -> Tensor:
        first = engine.held_range(name).start
        return engine.held(name, kind)[ranges[name].start - first : ranges[name].stop - first]

    return {
        tensor_name(kind, name): TensorSource(torch.float32, (len(part),), functools.partial(read, kind, name))
        for kind in STATE_KINDS
        for name, part in ranges.items()
    }


def tensor_name(kind: StateKind, name: str) -> str:
    """Return the name of a parameter's weight or moment in the file of a rank."""
    return f"{kind}/{name}"


def collect_buffers(engine: Engine) -> dict[str, Tensor]:
    """Return copies of the buffers that belong to the model's state, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state_buffers(engine.model).items()}


def restore(engine: Engine, read: ReadRange, adam_step: int) -> None:
    """Set the state that this rank holds, and Adam's step counter, of an engine that was built with the same weights.

    Nothing else is read, and no rank communicates.
    """
    for name in engine.shapes():
        held = engine.held_range(name)
        for kind in STATE_KINDS:
            engine.set_held(name, kind, read(kind, name, held.start, held.stop))
    engine.adam_step = adam_step


def restore_weights(engine: Engine, read: Callable[[str, int, int], Tensor]) -> None:
    """Set the fp32 weights of an engine that was built with the same weights, perhaps rounded.

    ``read`` returns the elements from ``start`` to ``stop`` of a flattened global tensor: name, start, stop.
    """
    for name in engine.shapes():
        held = engine.held_range(name)
        engine.set_held(name, "weight", read(name, held.start, held.stop).float())


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


class StoredWeights:
    """The ranges that ``read`` returns (name, start, stop), as a source of a model's weights; see ``WeightSource``."""

    def __init__(self, read: Callable[[str, int, int], Tensor]) -> None:
        self._read = read

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """See ``WeightSource``."""
        out.copy_(self._read(name, start, start + len(out)))


def load_model(
    model: nn.Module,
    read: Callable[[str], Tensor],
    stored: Container[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    distributed: Distributed | None = None,
) -> None:
    """Copy the global tensors that ``read`` returns by name into the model's parameters and buffers.

    They are rounded to its dtype, and a sharded parameter receives this rank's shard. Parameters on the meta device
    receive memory on ``device`` in ``dtype``, and are divided over the ranks of ``distributed``.
    """
    # Of a tensor that is backed by a file, only this range is read.
    source = StoredWeights(lambda name, start, stop: read(name).flatten()[start:stop])
    fill_model(model, source, device=device, dtype=dtype, distributed=distributed)
    load_buffers(model, read, stored)


def load_buffers(model: nn.Module, read: Callable[[str], Tensor], stored: Container[str]) -> None:
    """Copy the tensors that ``read`` returns by name into the buffers that belong to the model's state.

    Averages of a shared selection that are not among the names in ``stored`` stay zero: not measured yet.
    """
    for name, value in state_buffers(model).items():
        if name in stored or not is_average(name):
            value.copy_(read(name))


def is_average(name: str) -> bool:
    """Return whether a buffer holds the averages of a shared selection, which models of other selections lack."""
    return name.endswith(f".{AVERAGES}")


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
    """Return the name and both shapes, as text, of every tensor whose shapes differ or that only one side has.

    Averages of a shared selection that only one side has are left out; see ``load_buffers``.
    """
    pairs = [(name, want.get(name), have.get(name)) for name in sorted(want.keys() | have.keys())]
    return [
        (name, _format_shape(ours), _format_shape(theirs))
        for name, ours, theirs in pairs
        if (not is_average(name) if ours is None or theirs is None else list(ours) != list(theirs))
    ]


def _format_shape(shape: Sequence[int] | None) -> str:
    return "none (no such tensor)" if shape is None else str(tuple(shape))


def random_states() -> dict[str, Any]:
    """Return the states of this process's generators as tensors, numbers, and texts."""
    _, keys, position, has_gauss, gauss = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    version, internal, next_gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        # A checkpoint stores no numpy arrays, hence tensors and plain numbers.
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
