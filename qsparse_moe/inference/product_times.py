"""Measure, once per machine and shape, the time that a product with chosen rows takes per row that it reads.

The table is in the file of ``row_costs``, beside the shares from which whole matrices are read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import torch

from qsparse_moe.inference.row_costs import costs_file, read_costs, write_costs
from qsparse_moe.kernels.row_product.op import row_product_native
from qsparse_moe.kernels.row_product.stored import StoredWeights, WeightFormat, store

logger = logging.getLogger(__name__)

Shape = tuple[int, int]
"""Number of rows (input features) and of columns of a matrix."""
_NUM_MATRICES = 24
_ROUNDS = 40
_SHARES = (0.25, 1.0)


def seconds_per_row(weight_format: WeightFormat, shapes: Iterable[Shape]) -> dict[Shape, float]:
    """Return the seconds per chosen row of one token and a matrix of every shape.

    Those that the file lacks are measured, which is logged. What a product takes beyond its rows is not in the table:
    the engine calls it from C++, a measurement from Python, which takes longer than the product itself.
    """
    known, found = read_costs(), {}
    for shape in dict.fromkeys(shapes):
        key = f"{weight_format} seconds per row {shape[0]}x{shape[1]}"
        if key not in known:
            logger.info("measuring a product with %d x %d weights in %s, once: %s", *shape, weight_format, costs_file())
            known[key] = [measure_row(weight_format, shape)]
            write_costs(known)
        found[shape] = known[key][0]
    return found


def measure_row(weight_format: WeightFormat, shape: Shape) -> float:
    """Return the seconds per row, from the least seconds over some rounds at two numbers of rows."""
    generator = torch.Generator().manual_seed(0)
    stored = store(torch.randn(_NUM_MATRICES, *shape, generator=generator), weight_format)
    order = torch.randperm(shape[0], generator=generator)
    counts = [max(1, round(share * shape[0])) for share in _SHARES]
    rows = [order[:count].sort().values.int() for count in counts]
    # In turns, so that a slow moment of the machine does not meet one of them only.
    rounds = [[_seconds(stored, chosen) for chosen in rows] for _ in range(_ROUNDS)]
    few, all_of_them = (min(one[place] for one in rounds) for place in range(2))
    return max(0.0, all_of_them - few) / max(counts[1] - counts[0], 1)


def _seconds(stored: StoredWeights, rows_K: torch.Tensor) -> float:
    values_K1 = torch.ones(len(rows_K), 1)
    start = time.perf_counter()
    for which in range(stored.num_matrices):
        row_product_native(stored, rows_K, values_K1, which=which)
    return (time.perf_counter() - start) / stored.num_matrices
