"""Fake int8 quantisation of rows with a straight-through gradient, as in sites with the number format int8."""

from __future__ import annotations

from functools import partial

import torch

from qsparse_moe.kernels import example_rows, tiles
from qsparse_moe.kernels.spec import Example, Implementation, OpSpec
from qsparse_moe.sparsity.quantize import fake_quantize

CASES = (
    "plain",
    "odd_sizes",
    "one_value",
    "no_rows",
    "ties",
    "zeros",
    "strided",
    "gaps",
    "several_tiles",
    "many_features",
)


def example_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return rows of different magnitudes; in ``ties`` many values are halfway between two codes."""
    x = example_rows.values_of(case, device)
    if case == "ties":
        x = torch.randint(-254, 255, x.shape, generator=example_rows.seeded(case)).to(x) / 2
        # The largest value of every row, which makes its scale 1: the halves are then halfway between two codes.
        x[:, 0] = 127.0
    else:
        x = x * torch.logspace(-3, 3, x.shape[0], device=device)[:, None]
    return Example({"x": example_rows.laid_out(case, x.to(dtype))})


SPEC = OpSpec(
    name="int8_fake_quantize",
    reference=partial(fake_quantize, number_format="int8"),
    fast={"triton": Implementation("qsparse_moe.kernels.int8_quantize.triton:fake_quantize_triton", tiles.why_not)},
    example_inputs=example_inputs,
    cases=CASES,
    budget=2.0,
)
