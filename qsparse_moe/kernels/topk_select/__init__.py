"""Top-K selection of the features of a row by magnitude, with the mask if requested."""

from __future__ import annotations

import torch

from qsparse_moe.kernels import example_rows, native, tiles
from qsparse_moe.kernels.spec import Example, Implementation, OpSpec
from qsparse_moe.sparsity.topk import topk_sparsify

_OP = "qsparse_moe.kernels.topk_select.op"
IMPLEMENTATIONS = {
    "native": Implementation(f"{_OP}:sparsify_native", native.why_not),
    "triton": Implementation(f"{_OP}:sparsify_triton", tiles.why_not),
    "torch": Implementation(f"{_OP}:sparsify_torch", lambda device: None),
}
"""Implementations of ``sparsify(x, num_selected, *, group_size=None, gradient="ste")``."""


def example_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return the rows of the case; ``masked_gradient`` is ``k_per_row`` with the masked gradient."""
    case, gradient = ("k_per_row", "masked") if case == "masked_gradient" else (case, "ste")
    x = example_rows.laid_out(case, example_rows.values_of(case, device).to(dtype))
    num_selected = example_rows.num_selected_of(case, x.shape[0], x.shape[1], device)
    return Example({"x": x}, {"num_selected": num_selected, "gradient": gradient})


SPEC = OpSpec(
    name="topk_select",
    reference=topk_sparsify,
    fast=IMPLEMENTATIONS,
    example_inputs=example_inputs,
    cases=(*example_rows.SHAPES, "masked_gradient"),
    budget=0.0,  # values are copied
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)
