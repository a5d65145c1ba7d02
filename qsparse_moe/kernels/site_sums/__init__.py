"""Sums of the rows of a site before and after its selection, and the pattern of their nonzero features."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparse_moe.kernels import example_rows, native
from qsparse_moe.kernels.spec import Example, Implementation, OpSpec
from qsparse_moe.sparsity import stats
from qsparse_moe.sparsity.topk import topk_sparsify

_OP = "qsparse_moe.kernels.site_sums.op"


def _selected(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    before = example_rows.values_of(case, device).to(dtype)
    num_selected = example_rows.num_selected_of(case, before.shape[0], before.shape[1], device)
    after = topk_sparsify(before, num_selected)
    return example_rows.laid_out(case, before), example_rows.laid_out(case, after)


def sums_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return the rows of the case before and after a selection."""
    before, after = _selected(case, dtype, device)
    return Example({"before_ND": before, "after_ND": after})


def pattern_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return the rows of the case; in ``k_per_row`` two of three experts read some of them, one row twice."""
    _, after = _selected(case, dtype, device)
    readers = stats.Readers()
    if case == "k_per_row":
        # Row 6 is read by two experts, and expert 1 reads nothing.
        row, expert = torch.tensor([4, 0, 6, 6, 1]), torch.tensor([0, 0, 0, 2, 2])
        readers = stats.Readers(row.to(device), expert.to(device), num_experts=3)
    return Example({"after_ND": after}, {"readers": readers})


SPEC = OpSpec(
    name="site_row_sums",
    reference=stats.row_sums,
    fast={"native": Implementation(f"{_OP}:row_sums_native", native.why_not)},
    example_inputs=sums_inputs,
    cases=tuple(example_rows.SHAPES),
    budget=2.0,
)
PATTERN_SPEC = OpSpec(
    name="site_row_pattern",
    reference=stats.row_pattern,
    fast={"native": Implementation(f"{_OP}:row_pattern_native", native.why_not)},
    example_inputs=pattern_inputs,
    cases=tuple(example_rows.SHAPES),
    budget=0.0,  # counts, flags, and copied magnitudes are exact
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)
