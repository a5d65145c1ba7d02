"""Measure, once per machine, the share of needed rows from which reading a whole matrix is faster than choosing rows.

Chosen rows are read with jumps in memory. If the tokens of a step need nearly all rows, reading all of them in order,
zeros included, can be faster. The share from which it is depends on the machine, the number format, and the number of
tokens that share the pass, so it is measured and stored in a file.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qsparse_moe.kernels import native
from qsparse_moe.kernels.row_product.op import row_product_native
from qsparse_moe.kernels.row_product.stored import StoredWeights, WeightFormat, store
from qsparse_moe.runs.folder import write_atomically

logger = logging.getLogger(__name__)

TOKENS = (1, 2, 4, 8)
"""The numbers of tokens per pass for which the engine is compiled."""
NEVER = 2.0
"""A share that no selection reaches."""
_SHARES = (0.6, 0.7, 0.8, 0.9, 0.95)
_SHAPE = (1024, 2048)
# Together larger than the caches of the processor, as a model's weights are.
_NUM_MATRICES = 24
_ROUNDS = 5
_BANDWIDTH = "read bandwidth"  # its key beside the number formats

Measure = Callable[[StoredWeights, Tensor, int], float]


def shares_to_read_all(weight_format: WeightFormat) -> list[float]:
    """Return, for 1, 2, 4 and 8 tokens, the share of needed rows from which all rows are read.

    It is ``NEVER`` where choosing rows is faster at every share. The shares come from the file of this machine; if it
    does not exist they are measured first, which takes some seconds and is logged.
    """
    file = costs_file()
    known = read_costs()
    if weight_format not in known:
        logger.info("measuring when to read whole matrices in %s on this machine, once: %s", weight_format, file)
        known[weight_format] = measure_shares(weight_format)
        write_costs(known)
    return known[weight_format]


def known_read_bandwidth() -> float:
    """Return ``measure_read_bandwidth`` of this machine and number of threads; measured once, like the shares."""
    file = costs_file()
    known = read_costs()
    if _BANDWIDTH not in known:
        logger.info("measuring the read bandwidth of this machine, once: %s", file)
        known[_BANDWIDTH] = [measure_read_bandwidth()]
        write_costs(known)
    return known[_BANDWIDTH][0]


def measure_read_bandwidth(num_bytes: int = 400 << 20, repeats: int = 7) -> float:
    """Return the bytes per second at which all threads together read a block that no cache holds."""
    block = torch.ones(num_bytes // 4)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    # The first round warms up. Other work on the machine can only slow a read down, so the fastest is the limit.
    return num_bytes / min(seconds[1:])


def measure_shares(weight_format: WeightFormat, measure: Measure | None = None) -> list[float]:
    """Measure the shares that ``shares_to_read_all`` returns.

    Args:
        weight_format: number format of the weights.
        measure: returns the seconds of a product of some matrices with chosen rows for a number of tokens; None: they
            are timed.
    """
    stored = store(torch.randn(_NUM_MATRICES, *_SHAPE, generator=torch.Generator().manual_seed(0)), weight_format)
    measure = measure or _seconds
    found = []
    for num_tokens in TOKENS:
        whole = measure(stored, torch.arange(_SHAPE[0], dtype=torch.int32), num_tokens)
        share_from = NEVER
        # From the largest share down, so that one noisy measurement at a smaller share has no effect.
        for share in reversed(_SHARES):
            if measure(stored, _chosen(share), num_tokens) <= whole:
                break
            share_from = share
        found.append(share_from)
    return found


def costs_file() -> Path:
    """Return the file of this machine; it differs by compiled operators, machine, and number of threads."""
    root = Path(os.environ.get("QSPARSE_MOE_CACHE", "~/.cache/qsparse_moe")).expanduser()
    # The name of the library has a digest of processor, flags and sources, so that changed operators are measured
    # again.
    library = native.library_path(native.DECODE).stem
    return root / "decode" / f"{library}-{platform.node()}-{torch.get_num_threads()}.json"


def _chosen(share: float) -> Tensor:
    # Sorted, as the engine's lists of features are: the order of the jumps is a part of their cost.
    # Seeded, so that every process of a machine measures the same jumps.
    order = torch.randperm(_SHAPE[0], generator=torch.Generator().manual_seed(1))
    return order[: round(share * _SHAPE[0])].sort().values.int()


def _seconds(stored: StoredWeights, rows_K: Tensor, num_tokens: int) -> float:
    """Return the least seconds over some rounds, each over all matrices."""
    values_KT = torch.ones(len(rows_K), num_tokens)
    # The minimum, because other processes can only make a round slower.
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for which in range(stored.num_matrices):
            row_product_native(stored, rows_K, values_KT, which=which)
        best = min(best, time.perf_counter() - start)
    return best


def read_costs() -> dict[str, list[float]]:
    """Return the table of this machine; empty if nothing was measured yet."""
    file = costs_file()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: the shares are measured again
        return {}
    return {name: [float(share) for share in shares] for name, shares in known.items()}


def write_costs(known: dict[str, list[float]]) -> None:
    """Store the table for the next process, which measures again if the file cannot be written."""
    file = costs_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(known, indent=1))
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): the next process measures again; QSPARSE_MOE_CACHE names another folder",
            file,
            error.strerror,
        )
