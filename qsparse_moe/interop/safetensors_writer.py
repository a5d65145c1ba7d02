"""Write a safetensors file whose tensors are made part by part, so that neither a file nor a tensor is held in memory.

The header holds the offset of every tensor, so it is laid out first. The parts are then read, converted, and written to
their places by several threads; torch and the system calls release the interpreter's lock.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qsparse_moe.training.checkpoint.tensor_file import safetensors_header

# Converted bytes stay in the second-level cache until they are written.
_BLOCK_BYTES = 2**20
# More threads compete for the memory, which one thread uses to more than half.
_NUM_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True)
class Part:
    """A range of a tensor's first dimension, or all of it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Returns the values, in any floating-point dtype and any memory layout. Called in any thread."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file: its dtype and shape, and the parts that follow each other along its first dimension."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def whole(cls, dtype: torch.dtype, shape: Sequence[int], read: Callable[[], Tensor]) -> TensorSpec:
        """Return the tensor that ``read`` returns in one part."""
        return cls(dtype, tuple(shape), (Part(tuple(shape), read),))


class SafetensorsFile:
    """A file of tensors that one or several processes write together.

    Raises:
        OSError: it cannot be written, in ``create`` or ``write``; the file is then incomplete.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.path, self.tensors = path, tensors
        layout = {name: (spec.dtype, spec.shape) for name, spec in tensors.items()}
        self._header, self._starts = safetensors_header(layout, metadata)
        self._num_bytes = sum(spec.nbytes for spec in tensors.values())

    def create(self) -> None:
        """Create the file with its header; one process does so before any writes a tensor."""
        with self.path.open("wb") as file:
            file.write(self._header)

    def write(self, *, part: int = 0, parts: int = 1) -> None:
        """Write one of ``parts`` equal shares of the tensors into the file.

        At most the bytes of its largest tensor are held in memory, in all threads together.
        """
        limit = max((spec.nbytes for spec in self.tensors.values()), default=0)
        begin, end = (len(self._header) + self._num_bytes * edge // parts for edge in (part, part + 1))
        jobs = (job for job in _jobs(self.tensors, self._starts) if begin <= job.start < end)
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            _write_parts(descriptor, jobs, limit)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _Job:
    part: Part
    dtype: torch.dtype
    start: int
    """Offset of the part in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.part.shape) * self.dtype.itemsize


def _jobs(tensors: Mapping[str, TensorSpec], starts: Mapping[str, int]) -> Iterator[_Job]:
    # In the order of the file, which the disk prefers.
    for name, start in starts.items():
        for part in tensors[name].parts:
            job = _Job(part, tensors[name].dtype, start)
            yield job
            start += job.nbytes


def _write_parts(descriptor: int, jobs: Iterator[_Job], limit: int) -> None:
    """Write the parts in several threads, of which those that are unfinished have at most ``limit`` bytes together."""
    running: deque[tuple[int, Future[None]]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="write") as pool:
        try:
            for job in jobs:
                while running and (
                    len(running) >= 2 * _NUM_THREADS or sum(size for size, _ in running) + job.nbytes > limit
                ):
                    running.popleft()[1].result()
                running.append((job.nbytes, pool.submit(_write_part, descriptor, job)))
            for _, future in running:
                future.result()
        except BaseException:
            # Otherwise leaving the pool would write what is waiting.
            pool.shutdown(cancel_futures=True)
            raise


@torch.no_grad()
def _write_part(descriptor: int, job: _Job) -> None:
    value = job.part.read()
    assert tuple(value.shape) == job.part.shape, (tuple(value.shape), job.part.shape)
    if not value.is_contiguous():
        # At once, in the same dtype, and as a matrix: only so does torch transpose in tiles, eight times as fast as the
        # same matrix in a stack of one (2.6 against 0.3 GB/s in bf16).
        matrix = value[0] if value.dim() == 3 and len(value) == 1 else value
        value = torch.empty(matrix.shape, dtype=matrix.dtype).copy_(matrix)
    flat, offset = value.view(-1), job.start
    if value.dtype == job.dtype:
        _write_all(descriptor, _bytes(flat), offset)
        return
    for block in flat.split(_BLOCK_BYTES // job.dtype.itemsize):
        converted = _bytes(block.to(job.dtype))
        _write_all(descriptor, converted, offset)
        offset += len(converted)


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    # The system may write a part only, at most 2 GiB.
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
