"""How long a rank is held up by collectives, whoever calls them: this package, PyTorch or DeepSpeed."""

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
"""An object and the name of its attribute."""


@contextlib.contextmanager
def timed_collectives(add: Callable[[float], None], kept_elsewhere: Iterable[PatchTarget] = ()) -> Iterator[None]:
    """Inside, call ``add`` with the seconds of every collective's call, and of every wait for one.

    ``torch.distributed`` has no hook for it, so its functions are exchanged for the time being. Not for CUDA: there
    a call only queues the work, and to wait for it would undo the overlap that is to be measured.

    Args:
        add: takes seconds.
        kept_elsewhere: where a library keeps such a function under a name of its own.
    """
    places: list[PatchTarget] = [*((dist, name) for name in CALLS if hasattr(dist, name)), *kept_elsewhere]
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            function = getattr(owner, name)
            if function is not None:
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
    """A collective under way, as its caller got it."""

    def __init__(self, work: Any, add: Callable[[float], None]) -> None:
        self._work, self._add = work, add

    def wait(self, *args: Any) -> Any:
        begin = time.perf_counter()
        done = self._work.wait(*args)
        self._add(time.perf_counter() - begin)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
