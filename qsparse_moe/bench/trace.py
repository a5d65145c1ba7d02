"""What a training step does besides computing: operators and their own time, copies, waits of the host, memory."""

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
_COPIES = ("copy_", "clone", "_to_copy", "cat", "constant_pad_nd", "index", "index_select", "gather")
# All of them hand a tensor's values, or a size that depends on them, to the host.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")


def profile(step: Step, *, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """``operators`` of ``operator_times``, ``copies`` and ``waits`` of ``copies_and_waits``."""
    return {"operators": operator_times(step, device=device)} | copies_and_waits(step, device=device)


def operator_times(step: Step, *, device: torch.device, top: int = 12) -> list[dict[str, Any]]:
    """The ``top`` operators of one step by the time they spend in themselves: name, calls, seconds, share of all."""
    on_cuda = device.type == "cuda"
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
    """The most bytes that the tensors made in one step take at once, counted by PyTorch's allocator.

    On a CPU that is the running sum of the profiler's allocations; buffers inside oneDNN and MKL are not among them.
    """
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def copies_and_waits(step: Step, *, device: torch.device, top: int = 16) -> dict[str, list[dict[str, Any]]]:
    """Every place of one step that copies tensors (largest first) or makes the host wait for a value.

    ``copies``: operator, place, calls, bytes written. ``waits``: operator, place, calls; on a CPU nothing waits, and
    these are the places that would on an accelerator. A place is the innermost line of this package, outside ``bench``.
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
    """Counts operators that copy or wait, by name and place."""

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
    """Also count ``tolist``, which reaches no operator on a CPU."""

    def watch(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ == "tolist" and isinstance(called.__self__, Tensor):
            recorder.waits["tolist", _place(frame)] += 1

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


@contextmanager
def _cuda_waits(recorder: _Recorder, device: torch.device) -> Iterator[None]:
    """Also count what CUDA itself reports as a wait, by its message."""
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
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "bench"):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "PyTorch"
