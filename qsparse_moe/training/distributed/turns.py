"""Ranks that take the batches of one process in turn, so that what they compute is what one process would compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qsparse_moe.training.distributed.ranks import Distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One turn: this rank's batch in it. All ranks have the same number of turns."""

    index: int
    """Index of the batch among those of all ranks."""
    num_batches: int
    """Number of batches of the turn, one for each of the first ranks."""
    distributed: Distributed

    @property
    def is_spare(self) -> bool:
        """Whether this rank has no batch left, and runs the first one again so that no rank gathers weights alone.

        Its results do not count.
        """
        return self.distributed.rank >= self.num_batches

    def gather(self, value: T) -> list[T]:
        """Return the values of the turn's batches in order, on every rank; a spare one is left out."""
        return self.distributed.all_gather(value)[: self.num_batches]


def turns(count: int, distributed: Distributed) -> Iterator[Turn]:
    """Yield the turns in which the ranks take ``count`` batches."""
    for first in range(0, count, distributed.world_size):
        num_batches = min(distributed.world_size, count - first)
        index = first + distributed.rank if distributed.rank < num_batches else 0
        yield Turn(index, num_batches, distributed)


def gather_in_order(values: Sequence[T], count: int, distributed: Distributed) -> list[T]:
    """Return the values of all ``count`` batches in order, on every rank, from those of this rank's turns."""
    by_rank = distributed.all_gather(list(values))
    return [by_rank[index % len(by_rank)][index // len(by_rank)] for index in range(count)]
