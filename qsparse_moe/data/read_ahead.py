"""Reads the sequences of the next step while the current one is computed, in a thread of the rank's process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qsparse_moe.data.batch import Batch
from qsparse_moe.errors import DataError

State = dict[str, Any]


@dataclass(frozen=True)
class ReadStep:
    """What was read for one step."""

    batches: list[Batch]
    """The rank's micro-batches; empty if there was an error."""
    stream_state: list[State] | None
    """The states of the rank's parts after the step, or before it if there was an error; None in table mode."""
    passes: list[int]
    """Number of passes over each source that the stream has finished; empty in table mode."""
    error: DataError | None = None
    """Why the step cannot be read."""


class StepReader:
    """Calls ``read(step)`` for one step after the other; at most one step is read before it is asked for."""

    def __init__(self, read: Callable[[int], ReadStep], *, in_background: bool) -> None:
        """Args: with ``in_background`` the step after the one that was taken is read in a thread."""
        self._read = read
        self._executor = ThreadPoolExecutor(1, "data") if in_background else None
        self._next: tuple[int, Future[ReadStep]] | None = None

    def take(self, step: int, *, is_last: bool = False) -> ReadStep:
        """Return what was read for ``step``, and begin to read the next one if that is done in the background.

        Nothing is read after the step that ``is_last``.
        """
        found = self.peek(step)
        self._next = None
        if self._executor is not None and found.error is None and not is_last:
            self._next = (step + 1, self._executor.submit(self._read, step + 1))
        return found

    def peek(self, step: int) -> ReadStep:
        """Return what was read for ``step``, which stays the next one."""
        if self._next is None or self._next[0] != step:
            self.forget()
            future: Future[ReadStep] = Future()
            future.set_result(self._read(step))
            self._next = (step, future)
        return self._next[1].result()

    def forget(self) -> None:
        """Drop the step that was read and not taken, and wait until no step is being read."""
        if self._next is not None and not self._next[1].cancel():
            self._next[1].exception()
        self._next = None

    def close(self) -> None:
        """End the thread; what it reads now is read to its end."""
        self.forget()
        if self._executor is not None:
            self._executor.shutdown()
