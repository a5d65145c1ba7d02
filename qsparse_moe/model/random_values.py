"""Random initial values of a tensor, of which any flat range can be drawn without the rest.

The value at each index of the flattened tensor is a function of the seed, the name of the tensor, and the index. It
does not depend on the range that is drawn, on the number of threads, or on the device and the dtype that keep it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

CUTOFF = 3.0
"""Normal values are truncated at this number of standard deviations (OLMoE, arXiv 2409.02060, appendix)."""

# Of the 32 random bits per value, the first 12 choose one of 4096 intervals of equal probability, and the others the
# place inside it. The table of intervals has 32 KiB and stays in the cache; 2**16 intervals were not faster.
_TABLE_BITS = 12
_PLACE_BITS = 32 - _TABLE_BITS
# One value of Philox's counter yields four numbers of 64 bits, that is eight values.
_PER_COUNT = 8
# Values that are computed at once: their temporaries, 20 bytes per value, stay in the cache of a core.
_PIECE = 1 << 14
# Values per task of the thread pool, so that threads on cores that others use as well take fewer tasks.
_TASK = 1 << 19


def fill_normal(seed: int, name: str, start: int, out: Tensor, *, std: float) -> None:
    """Write values ``start`` to ``start + len(out)`` of the flattened tensor ``name`` into ``out``.

    They are normal with ``std`` before truncation at ``CUTOFF * std``. Each is computed in fp32 on the CPU and rounded
    to the dtype of ``out``. As many threads as PyTorch uses draw at the same time.

    Args:
        seed: the seed of all tensors.
        name: the name of the tensor.
        start: index of the first value in the flattened tensor.
        out: one-dimensional, of any floating-point dtype and on any device.
        std: the standard deviation before the truncation.
    """
    key = _key(seed, name)
    tasks = [(begin, out[begin : begin + _TASK]) for begin in range(0, len(out), _TASK)]
    draw = functools.partial(_draw, key, std=std)
    if len(tasks) == 1 or torch.get_num_threads() == 1:
        for begin, part in tasks:
            draw(start + begin, part)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # The list raises what a thread has raised.
        list(pool.map(lambda task: draw(start + task[0], task[1]), tasks))


def _key(seed: int, name: str) -> int:
    """Return the 128 bits of Philox's key."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest(), "little")


@torch.no_grad()
def _draw(key: int, start: int, out: Tensor, *, std: float) -> None:
    is_final = out.dtype == torch.float32 and out.device.type == "cpu"
    drawn = 0
    for values in _pieces(key, start, len(out)):
        part = out[drawn : drawn + len(values)]
        if is_final:
            np.multiply(values, np.float32(std), out=part.numpy())
        else:
            part.copy_(torch.from_numpy(values * np.float32(std)))
        drawn += len(values)


def _pieces(key: int, start: int, length: int) -> Iterator[np.ndarray]:
    """Yield ``length`` standard values from index ``start`` on, in pieces that are overwritten by the next one."""
    skipped = start % _PER_COUNT
    generator = np.random.Philox(key=key, counter=start // _PER_COUNT)
    index, place = np.empty(_PIECE, np.intp), np.empty(_PIECE, np.uint32)
    values, gathered = np.empty(_PIECE, np.float32), np.empty(_PIECE, np.float32)
    lower, slope = _table()
    left = skipped + length
    while left > 0:
        size = min(left, _PIECE)
        # The stream of raw numbers is the same in every version of NumPy; that of its normal values is not.
        bits = generator.random_raw(-(-size // 2)).astype("<u8", copy=False).view("<u4")[:size]
        np.right_shift(bits, np.uint32(_PLACE_BITS), out=index[:size], casting="unsafe")
        np.bitwise_and(bits, np.uint32((1 << _PLACE_BITS) - 1), out=place[:size])
        np.copyto(values[:size], place[:size], casting="unsafe")
        # Products and sums only: unlike logarithms, they have the same bits on every processor. Every index is valid,
        # and without the mode numpy would check it in a buffer.
        np.multiply(values[:size], slope.take(index[:size], out=gathered[:size], mode="clip"), out=values[:size])
        np.add(values[:size], lower.take(index[:size], out=gathered[:size], mode="clip"), out=values[:size])
        yield values[skipped:size]
        skipped, left = 0, left - size


@functools.cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return the lower end of each interval and its length per place, of a normal distribution cut at ``CUTOFF``."""
    normal, count = NormalDist(), 1 << _TABLE_BITS
    outside = normal.cdf(-CUTOFF)
    inner = [normal.inv_cdf(outside + (1 - 2 * outside) * i / count) for i in range(1, count)]
    ends = np.array([-CUTOFF, *inner, CUTOFF])
    return ends[:-1].astype(np.float32), (np.diff(ends) / (1 << _PLACE_BITS)).astype(np.float32)
