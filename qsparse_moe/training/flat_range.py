"""Ranges of flattened global tensors: whatever the layout, a rank holds one contiguous range of every parameter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qsparse_moe.moe.expert_group import expert_group


@dataclass(frozen=True)
class FlatRange:
    """The elements ``start`` to ``stop``, without ``stop``, of a flattened global tensor; it may be empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, self

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, index: int, count: int) -> FlatRange:
        """Return part ``index`` of ``count`` consecutive parts, whose sizes differ by at most one element."""
        size, longer = divmod(len(self), count)
        start = self.start + index * size + min(index, longer)
        return FlatRange(start, start + size + (index < longer))

    def part_of_size(self, size: int, index: int) -> FlatRange:
        """Return part ``index`` of consecutive parts of ``size`` elements each, of which the last may be shorter."""
        return FlatRange(min(self.start + index * size, self.stop), min(self.start + (index + 1) * size, self.stop))

    def moved(self, distance: int) -> FlatRange:
        """Return the range ``distance`` elements further on."""
        return FlatRange(self.start + distance, self.stop + distance)


def shard_range(parameter: Tensor, num_elements: int) -> FlatRange:
    """Return the range of this rank's shard of a parameter: all of it, except of experts that ranks share.

    Args:
        parameter: the parameter with its tag, perhaps emptied by ZeRO-3.
        num_elements: the number of elements of the global tensor.
    """
    group = expert_group(parameter)
    # The experts are the first dim of every stacked matrix, so those of a rank follow each other.
    return FlatRange(0, num_elements).part(group.rank, group.size)
