"""Measures the time that a rank spends in collectives, whether this package, PyTorch, or DeepSpeed calls them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

CALLS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
PatchTarget = tuple[object, str]
"""An object and the name of the attribute to patch."""


@contextlib.contextmanager
def timed_collectives(add: Callable[[float], None], aliases: Iterable[PatchTarget] = ()) -> Iterator[None]:
    """Call ``add`` with the seconds of every call of a collective, and of every wait for one, inside the block.

    ``torch.distributed`` has no hook for this, so its functions are patched. Do not use it on CUDA: a call there only
    queues the work, and waiting for the work would prevent the overlap that is to be measured.

    Args:
        add: called with seconds.
        aliases: further attributes that refer to these functions, such as those of a library that stores them.
    """
    targets: list[PatchTarget] = [*((dist, name) for name in CALLS if hasattr(dist, name)), *aliases]
    with contextlib.ExitStack() as stack:
        for owner, name in targets:
            function = getattr(owner, name)
            if function is not None:  # DeepSpeed stores None for a collective that torch lacks.
                stack.enter_context(mock.patch.object(owner, name, _timed(function, add)))
        yield


def _timed(function: Callable[..., Any], add: Callable[[float], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        work = function(*args, **kwargs)
        add(time.perf_counter() - begin)
        return None if work is None else _TimedWork(work, add)

    return call


class _TimedWork:
    """The handle of an asynchronous collective, whose ``wait`` is timed."""

    def __init__(self, work: Any, add: Callable[[float], None]) -> None:
        self._work, self._add = work, add

    def wait(self, *args: Any) -> Any:
        begin = time.perf_counter()
        done = self._work.wait(*args)
        self._add(time.perf_counter() - begin)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
