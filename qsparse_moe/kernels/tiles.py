"""Launch parameters of the Triton kernels: device, shape of the tiles, and number of warps."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

MAX_FEATURES = 65536
"""Maximum row length: a row is held in the registers of one program, 64 fp32 values per thread at 32 warps."""
# Gives each of four warps several loads of 16 bytes. A longer row is a tile of its own.
_TILE_SIZE = 2048


class Tile(NamedTuple):
    """Rows and columns of the tile of one program, both powers of two, and the number of warps of the program."""

    rows: int
    columns: int
    num_warps: int


def why_not(device: torch.device) -> str | None:
    """Return the reason why the Triton kernels cannot run on ``device``, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; pip install "qsparse-moe[gpu]"'
    if device.type != "cuda" and not interpreted():
        return (
            f"the Triton kernels run on CUDA devices, the device is {device.type}; TRITON_INTERPRET=1 runs them slowly"
        )
    return None


def interpreted() -> bool:
    """Return whether kernels run under Triton's interpreter. Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def row_tile(num_rows: int, num_features: int) -> Tile:
    """Return a tile of whole rows.

    Raises:
        ValueError: a row has more than ``MAX_FEATURES`` features.
    """
    if num_features > MAX_FEATURES:
        raise ValueError(f"rows of the Triton kernels hold at most {MAX_FEATURES} features, got {num_features}")
    # tl.arange takes powers of two only; the kernels mask what lies beyond the row.
    columns = power_of_two(num_features)
    # No more rows than there are, since a masked row costs as much as a real one.
    rows = min(max(1, _TILE_SIZE // columns), power_of_two(num_rows))
    return Tile(rows, columns, _warps(rows * columns))


def flat_tile(num_rows: int, num_features: int) -> Tile:
    """Return a tile for element-wise operations; a row may span several tiles."""
    columns = min(power_of_two(num_features), _TILE_SIZE)
    rows = min(max(1, _TILE_SIZE // columns), power_of_two(num_rows))
    return Tile(rows, columns, _warps(rows * columns))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number`` and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the device of ``x`` is current, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _warps(num_values: int) -> int:
    # 512 values per warp are 16 per thread. A block has at most 32 warps, and fewer than 4 would not hide latency.
    return min(32, max(4, power_of_two(num_values // 512)))
