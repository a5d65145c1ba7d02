"""Trace a training step: self time of operators, copies, waits of the host, and memory."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qsparse_moe

Step = Callable[[], object]
_PACKAGE = Path(qsparse_moe.__file__).parent
# These operators write elements of their input to another place, without computing anything.
_COPIES = ("copy_", "clone", "_to_copy", "cat", "constant_pad_nd", "index", "index_select", "gather")
# These operators return values of a tensor, or a size that depends on them, to the host.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")


def profile(step: Step, *, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Return ``operators`` from ``operator_times``, and ``copies`` and ``waits`` from ``copies_and_waits``."""
    return {"operators": operator_times(step, device=device)} | copies_and_waits(step, device=device)


def operator_times(step: Step, *, device: torch.device, top: int = 12) -> list[dict[str, Any]]:
    """Return the ``top`` operators of one step by self time: name, calls, seconds, and share of the total."""
    on_cuda = device.type == "cuda"
    # Warm-up: caches and lazily created buffers are not part of a typical step.
    step()
    with torch.profiler.profile() as profiler:
        step()
    events = profiler.key_averages()
    own = [(e.self_device_time_total if on_cuda else e.self_cpu_time_total, e.key, e.count) for e in events]
    total = sum(time for time, _, _ in own)
    return [
        {"name": name, "calls": calls, "seconds": time / 1e6, "share": round(time / total, 4)}
        for time, name, calls in sorted(own, reverse=True)[:top]
    ]


def peak_bytes(step: Step, *, device: torch.device) -> int:
    """Return the peak bytes of the tensors allocated during one step, counted by PyTorch's allocator.

    On a CPU this is the peak of the running sum of the profiler's allocations, without buffers inside oneDNN and MKL.
    """
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        # What was allocated before the step are weights and inputs, which every contender holds.
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # The profiler's public tables hold sums per operator, and a peak needs every allocation in the order of time.
    results: Any = profiler.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def copies_and_waits(step: Step, *, device: torch.device, top: int = 16) -> dict[str, list[dict[str, Any]]]:
    """Return the source lines that copy tensors (largest first) or make the host wait for a value in one step.

    ``copies``: operator, place, calls, bytes written. ``waits``: operator, place, calls; on a CPU nothing waits, and
    the list shows the lines that would wait on an accelerator. A place is the innermost line of this package outside
    ``bench``.
    """
    recorder = _Recorder()
    step()
    with _python_calls(recorder), _cuda_waits(recorder, device), recorder:
        step()
    copies: list[dict[str, Any]] = [
        {"operator": name, "place": place, "calls": calls, "bytes": recorder.bytes[name, place]}
        for (name, place), calls in recorder.copies.items()
    ]
    waits = [{"operator": name, "place": place, "calls": calls} for (name, place), calls in recorder.waits.items()]
    return {"copies": sorted(copies, key=lambda copy: -copy["bytes"])[:top], "waits": waits}


class _Recorder(TorchDispatchMode):
    """Count the operators that copy or wait, by name and place."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _COPIES and isinstance(result, Tensor):
            key = name, _place(sys._getframe(1))
            self.copies[key] += 1
            self.bytes[key] += result.nbytes
        elif name in _WAITS:
            self.waits[name, _place(sys._getframe(1))] += 1
        return result


@contextmanager
def _python_calls(recorder: _Recorder) -> Iterator[None]:
    """Also count ``tolist``, which dispatches no operator on a CPU."""

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == "tolist" and isinstance(called.__self__, Tensor):
            recorder.waits["tolist", _place(frame)] += 1

    # A profiler of the caller is put back afterwards.
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def _cuda_waits(recorder: _Recorder, device: torch.device) -> Iterator[None]:
    """Also count the waits that CUDA itself reports, by their message."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.waits.update((str(w.message).splitlines()[0], f"{w.filename}:{w.lineno}") for w in caught)


def _place(frame: FrameType | None) -> str:
    # The innermost line of the package, because the frames above it are PyTorch and this module.
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "bench"):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "PyTorch"
