"""Block top-K: selection in every contiguous group of G features, by the kernels of row top-K over the groups."""

from __future__ import annotations

import torch

from qsparse_moe.kernels import topk_select
from qsparse_moe.kernels.example_rows import LARGE, seeded
from qsparse_moe.kernels.spec import Example, OpSpec
from qsparse_moe.sparsity.topk import topk_sparsify

# (N, D, G, K per group); 16 of 32 is the pattern of the paper (arXiv 2407.10969, section 2.4).
CASES = {
    "paper": (5, 96, 32, 16),
    "odd_group": (4, 35, 7, 3),
    "one_group": (3, 32, 32, 5),
    "groups_of_one": (3, 8, 1, 1),
    "groups_of_16": (3, 48, 16, 5),
    "groups_of_64": (3, 128, 64, 24),
    "no_rows": (0, 32, 8, 4),
    "ties": (6, 64, 16, 4),
    "k_per_row": (6, 64, 8, 0),
    "masked_gradient": (6, 64, 8, 0),
}


def example_inputs(case: str, dtype: torch.dtype, device: str) -> Example:
    """Return the rows of the case; a K of 0 in ``CASES`` means a random K per row."""
    beyond = {"large": (*LARGE[torch.device(device).type], 32, 16), "many_rows": (700, 96, 32, 16)}
    num_rows, width, group_size, per_group = (beyond | CASES)[case]
    x = torch.randn(num_rows, width, generator=seeded(case))
    x = x.round() if case == "ties" else x
    num_selected: int | torch.Tensor = per_group * width // group_size
    if not per_group:
        drawn = torch.randint(1, group_size + 1, (num_rows,), generator=seeded(case, "k"))
        # A multiple of the number of groups, as block selection requires of K.
        num_selected = drawn.to(device) * (width // group_size)
    gradient = "masked" if case == "masked_gradient" else "ste"
    settings = {"num_selected": num_selected, "group_size": group_size, "gradient": gradient}
    return Example({"x": x.to(device, dtype)}, settings)


SPEC = OpSpec(
    name="block_topk",
    reference=topk_sparsify,
    fast=topk_select.IMPLEMENTATIONS,
    example_inputs=example_inputs,
    cases=tuple(CASES),
    budget=0.0,  # values are copied
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
)
