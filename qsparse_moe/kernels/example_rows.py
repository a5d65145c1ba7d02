"""Example inputs for tests and benchmarks of operations: odd sizes, ties, extremes of K. N rows, D features."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

SHAPES = {
    "plain": (5, 48),
    "odd_sizes": (3, 37),
    "one_value": (1, 1),
    "no_rows": (0, 16),
    "one_selected": (4, 33),
    "all_selected": (4, 33),
    "k_per_row": (7, 41),
    "ties": (6, 40),
    "zeros": (3, 24),
    "strided": (5, 36),
    "gaps": (5, 35),
    "several_tiles": (70, 41),
    "many_features": (2, 1100),
    "tiles_of_columns": (2, 2100),
}
"""(N, D) of each case. ``several_tiles`` needs several Triton programs of several rows each; ``tiles_of_columns`` needs
several tiles per row, because ``tiles.flat_tile`` has at most 2,048 columns."""
MANY_ROWS = (8192, 37)
"""(N, D) of the case ``many_rows``, which gives every thread of the C++ operators several chunks of rows."""
LARGE = {"cpu": (2048, 768), "cuda": (65536, 1024)}
"""(N, D) of the case ``large`` per device type: rows and hidden width of one MoE layer in a training step."""


def shape_of(case: str, device: str) -> tuple[int, int]:
    """Return ``(N, D)`` of a case."""
    if case == "many_rows":
        return MANY_ROWS
    return LARGE[torch.device(device).type] if case == "large" else SHAPES[case]


def seeded(case: str, salt: str = "") -> torch.Generator:
    """Return a generator that is seeded by the name of the case."""
    # crc32 and not hash(), which differs between processes.
    return torch.Generator().manual_seed(zlib.crc32(f"{case} {salt}".encode()))


def values_of(case: str, device: str, salt: str = "") -> Tensor:
    """Return normal values ``(N, D)`` in fp32: for ``strided`` a transposed view, for ``ties`` few distinct values."""
    num_rows, width = shape_of(case, device)
    if case == "strided":
        return torch.randn(width, num_rows, generator=seeded(case, salt)).T.to(device)
    # Drawn on the CPU, so that every device gets the same values.
    rows = torch.randn(num_rows, width, generator=seeded(case, salt))
    if case == "ties":
        # Halves are exact in every dtype, so that all of them have the same ties.
        rows = (2 * rows).round() / 2
    return (torch.zeros_like(rows) if case == "zeros" else rows).to(device)


def laid_out(case: str, rows_ND: Tensor) -> Tensor:
    """Return the rows as they are, or for ``gaps`` with NaN in memory between one row and the next."""
    if case != "gaps":
        return rows_ND
    # NaN, so that a kernel that ignores the stride of the rows cannot pass.
    between = torch.full_like(rows_ND[:, :5], torch.nan)
    return torch.cat((rows_ND, between), dim=1)[:, : rows_ND.shape[1]]


def num_selected_of(case: str, num_rows: int, width: int, device: str) -> int | Tensor:
    """Return K of the case: half of the features, one, all of them, or a random number per row."""
    if case in ("k_per_row", "ties"):
        return torch.randint(1, width + 1, (num_rows,), generator=seeded(case, "k")).to(device)
    return {"one_selected": 1, "all_selected": width}.get(case, (width + 1) // 2)
