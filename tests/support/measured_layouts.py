"""Train the runs of a plan on this rank and write the bytes that each phase allocates and sends.

    python tests/support/measured_layouts.py PLAN.json
    deepspeed --num_gpus 2 tests/support/measured_layouts.py PLAN.json

The memory is that of PyTorch's allocator on the CPU: the tensors that are alive where a phase begins, and from the
profiler, which has an event for every allocation and release, the largest sum of them within the phase. The collectives
are counted where ``torch.distributed`` is called, with the sizes of the tensors that it is given.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from qsparse_moe.config.schema import RunConfig

PHASES = {"prepare_run": "build", "train_step": "step"}
"""Functions that ``training/loop.py`` calls, and the phase of a run that each of them is; ``save`` is a method."""

Counts = dict[str, float]
_sent: dict[str, Counts] = {}
_live: dict[str, float] = {}
_phase: list[str] = []
_earlier: dict[int, weakref.ref[torch.Tensor]] = {}


def num_bytes(tensors: Any) -> int:
    """Return the bytes of a tensor, or of the tensors of a list."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(num_bytes(tensor) for tensor in tensors)


def sent_bytes(name: str, arguments: dict[str, Any], ranks: int) -> float:
    """Return the bytes that one rank sends in a collective, as a ring of ``ranks`` ranks sends them."""
    share = (ranks - 1) / ranks
    if name == "all_reduce":
        return 2 * share * num_bytes(arguments["tensor"])
    if name in ("all_gather", "all_gather_into_tensor"):
        return share * num_bytes(arguments.get("tensor_list") or arguments["output_tensor"])
    if name in ("reduce_scatter", "reduce_scatter_tensor"):
        return share * num_bytes(arguments.get("input_list") or arguments["input"])
    if name == "all_to_all_single":
        return share * num_bytes(arguments["input"])
    if name == "reduce":
        return share * num_bytes(arguments["tensor"])
    assert name == "broadcast", name
    return share * num_bytes(arguments["tensor"])


_NAMES = {
    "all_reduce": ("tensor",),
    "all_gather": ("tensor_list", "tensor"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "reduce_scatter": ("output", "input_list"),
    "reduce_scatter_tensor": ("output", "input"),
    "all_to_all_single": ("output", "input"),
    "reduce": ("tensor",),
    "broadcast": ("tensor",),
}


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, which adds what it sends to the counts of the phase."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(_NAMES[name], args, strict=False)) | kwargs
        ranks = dist.get_world_size(kwargs.get("group"))
        if _phase:
            counts = _sent.setdefault(_phase[-1], {})
            counts[name] = counts.get(name, 0.0) + sent_bytes(name, arguments, ranks)
        return function(*args, **kwargs)

    return call


def count_collectives() -> None:
    """Count every collective of this process, before DeepSpeed is imported, which keeps some of the functions."""
    for name in _NAMES:
        setattr(dist, name, counted(name, getattr(dist, name)))


@contextlib.contextmanager
def marked_phases() -> Iterator[None]:
    """Name the phases of a run in the profiler's events; each step has the name ``step``."""
    from qsparse_moe.training import loop

    with contextlib.ExitStack() as stack:
        for name, phase in PHASES.items():
            stack.enter_context(mock.patch.object(loop, name, _in_phase(phase, getattr(loop, name))))
        writer = loop.CheckpointWriter
        stack.enter_context(mock.patch.object(writer, "save", _in_phase("save", writer.save)))
        yield


def _in_phase(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Cycles of references keep tensors until Python looks for them, at a time that differs in every run.
        gc.collect()
        name = f"{phase} {kwargs['step']}" if phase == "step" else phase
        _live[name] = live_bytes(_earlier)
        _phase.append(name)
        with record_function(f"phase {name}"):
            result = function(*args, **kwargs)
        _phase.pop()
        return result

    return call


def live_tensors() -> list[torch.Tensor]:
    """Return the tensors in host memory that Python has an object for, and the gradients of the leaves among them."""
    # Not isinstance, which asks proxies of packages for their class and imports what is behind them.
    known = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    # A gradient has no object until something asks for it.
    gradients = [tensor.grad for tensor in known if tensor.is_leaf and tensor.grad is not None]
    return [tensor for tensor in (*known, *gradients) if tensor.device.type == "cpu"]


def live_bytes(without: dict[int, weakref.ref[torch.Tensor]] | None = None) -> float:
    """Return the bytes of the storages of all live tensors ``without`` these."""
    left_out = without or {}
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in live_tensors()
        if id(tensor) not in left_out or left_out[id(tensor)]() is not tensor
    }
    return float(sum(found.values()))


def peaks(recorded: profile) -> dict[str, float]:
    """Return the largest number of live bytes in every phase."""
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), index) for index, event in enumerate(events) if event.name() == "[memory]")
    found: dict[str, float] = {}
    for span in (event for event in events if event.name().startswith("phase ")):
        name, begin = span.name().removeprefix("phase "), span.start_ns()
        # The sum starts anew in every phase: a few releases have no event, which would add up over a run.
        within = [events[index].nbytes() for time, index in changes if begin <= time <= begin + span.duration_ns()]
        found[name] = _live[name] + max(itertools.accumulate(within, initial=0))
    return found


def measure(config: RunConfig) -> dict[str, Any]:
    """Train a run and return its peaks in bytes by phase and its sent bytes by phase and collective."""
    from qsparse_moe.training.loop import train

    _sent.clear()
    _live.clear()
    gc.collect()
    # DeepSpeed keeps the tensors of an ended engine until another one takes its place.
    _earlier.clear()
    _earlier.update({id(tensor): weakref.ref(tensor) for tensor in live_tensors()})
    with marked_phases(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train(config)
    return {"peaks": peaks(recorded), "sent": dict(_sent)}


def main(plan: Path) -> None:
    """Measure every run of ``plan`` and write ``LABEL.rankN.json`` beside it."""
    torch.set_num_threads(1)
    count_collectives()
    from qsparse_moe.training.distributed.launcher_environment import launcher_ranks

    for label, settings in json.loads(plan.read_text()).items():
        found = measure(RunConfig.model_validate(settings))
        (plan.parent / f"{label}.rank{launcher_ranks().rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # The launcher adds its own arguments in front.
    main(Path(sys.argv[-1]))
