"""The products of routed tokens with the matrices of their experts, for two stacks of weights at once."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qsparse_moe.kernels import example_rows, native
from qsparse_moe.kernels.expert_products.reference import expert_products
from qsparse_moe.kernels.spec import Example, Implementation, OpSpec


class _Shape(NamedTuple):
    counts: tuple[int, ...]
    inner: int
    outer: int


SHAPES = {
    "plain": _Shape((5, 0, 7), 48, 32),
    "odd_sizes": _Shape((1, 13, 3), 34, 22),
    "one_row": _Shape((1,), 2, 2),
    "no_rows": _Shape((0, 0, 0), 16, 24),
    "all_on_one": _Shape((0, 29, 0), 16, 48),
    "gaps": _Shape((4, 9), 32, 16),
    "transposed": _Shape((11, 2, 6), 20, 36),
    "many_rows": _Shape(tuple(7 * expert % 61 for expert in range(64)), 64, 48),
    "tiles_of_columns": _Shape((9, 4), 300, 260),
    "large": _Shape((64,) * 128, 256, 96),
}
"""Rows per expert and both widths. A panel of columns has at most 64 of them, and a block of rows at most 8."""


def example_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return rows with NaN between them in ``gaps``, and weights that are transposed views in ``transposed``."""
    counts, inner, outer = SHAPES[case]
    generator = example_rows.seeded(case)
    rows = torch.randn(sum(counts), inner, generator=generator).to(device, dtype)
    gate, up = (torch.randn(len(counts), inner, outer, generator=generator).to(device, dtype) for _ in range(2))
    if case == "transposed":
        gate, up = (weights.mT.contiguous().mT for weights in (gate, up))
    tensors = {"rows_NX": example_rows.laid_out(case, rows), "first_EXY": gate, "second_EXY": up}
    return Example(tensors, {"counts_E": torch.tensor(counts)})


SPEC = OpSpec(
    name="expert_products",
    reference=expert_products,
    fast={"native": Implementation("qsparse_moe.kernels.expert_products.op:expert_products", native.why_not)},
    example_inputs=example_inputs,
    cases=tuple(case for case in SHAPES if case != "large"),
    budget=2.0,
)
