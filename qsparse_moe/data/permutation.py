"""A random permutation that is computed index by index, without an array of its size.

A Feistel network over a grid: an index is a cell (x, y) of a grid, and every round adds a hash of one coordinate to the
other one, modulo the grid's size in that direction. A round can be undone, so any number of rounds permutes the cells.
The grid has less than a row of cells more than there are indices; an index that lands on one of those is permuted again
until it does not (cycle walking), which keeps the mapping one to one. See Black and Rogaway, "Ciphers with
arbitrary finite domains" (2002).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from qsparse_moe.data.packing import Array

# With 8 rounds the permutations of 5 elements were not equally likely (chi-square 229 at 119 degrees of freedom); with
# 12 they are, and larger sizes show no structure with either.
_NUM_ROUNDS = 12
# The constants and shifts of the finalizer of SplitMix64 (Steele, Lea, and Flood, 2014).
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def permuted(indices: Array, *, size: int, key: tuple[int, ...]) -> Array:
    """Return the values at ``indices`` of the random permutation of ``range(size)`` that ``key`` selects, int64.

    Every key selects another permutation, and the values depend on nothing else: neither on the other indices of the
    call nor on earlier calls.

    Args:
        indices: non-negative integers below ``size``, of any shape.
        size: number of elements of the permutation.
        key: non-negative integers, such as a seed and an epoch.
    """
    width = max(1, math.isqrt(size - 1) + 1)
    height = -(-size // width)
    cells = _mixed(np.asarray(indices, np.uint64), width, height, _round_keys(key))
    while (outside := cells >= size).any():
        cells[outside] = _mixed(cells[outside], width, height, _round_keys(key))
    return cells.astype(np.int64)


@lru_cache(maxsize=8)
def _round_keys(key: tuple[int, ...]) -> Array:
    return np.random.SeedSequence(key).generate_state(_NUM_ROUNDS, np.uint64)


def _mixed(cells: Array, width: int, height: int, round_keys: Array) -> Array:
    columns, rows = np.uint64(width), np.uint64(height)
    y, x = np.divmod(cells, columns)
    for number in range(0, _NUM_ROUNDS, 2):
        x = (x + _hash(y, round_keys[number])) % columns
        y = (y + _hash(x, round_keys[number + 1])) % rows
    return y * columns + x


def _hash(values: Array, key: np.uint64) -> Array:
    """Return a hash of each value of at most 62 bits, so that adding a coordinate cannot overflow."""
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
    return (mixed ^ (mixed >> _SHIFTS[2])) >> np.uint64(2)
