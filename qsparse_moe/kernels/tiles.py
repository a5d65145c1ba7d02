"""How the Triton kernels of this package are launched: where, on tiles of which shape, with how many warps."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

MAX_FEATURES = 65536
"""A row is held in the registers of one program: at 32 warps 64 fp32 values a thread."""
# Enough values to give each of four warps several loads of 16 bytes; a longer row is a tile by itself.
_TILE_SIZE = 2048


class Tile(NamedTuple):
    """Rows and columns of the tile of one program, powers of two, and the warps that share it."""

    rows: int
    columns: int
    num_warps: int


def why_not(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on ``device``, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; pip install "qsparse-moe[gpu]"'
    if device.type != "cuda" and not interpreted():
        return (
            f"the Triton kernels run on CUDA devices, the device is {device.type}; TRITON_INTERPRET=1 runs them slowly"
        )
    return None


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, which reads this variable when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def row_tile(num_rows: int, num_features: int) -> Tile:
    """A tile that holds whole rows.

    Raises:
        ValueError: a row has more than ``MAX_FEATURES`` features.
    """
    if num_features > MAX_FEATURES:
        raise ValueError(f"rows of the Triton kernels hold at most {MAX_FEATURES} features, got {num_features}")
    columns = power_of_two(num_features)
    rows = min(max(1, _TILE_SIZE // columns), power_of_two(num_rows))
    return Tile(rows, columns, _warps(rows * columns))


def flat_tile(num_rows: int, num_features: int) -> Tile:
    """A tile of values that do not depend on each other; a row may span several."""
    columns = min(power_of_two(num_features), _TILE_SIZE)
    rows = min(max(1, _TILE_SIZE // columns), power_of_two(num_rows))
    return Tile(rows, columns, _warps(rows * columns))


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``, and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; inside this context that is the one of ``x``."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _warps(num_values: int) -> int:
    # 512 values a warp are 16 a thread; between the 4 warps of a small block and the 32 that a block may have.
    return min(32, max(4, power_of_two(num_values // 512)))
